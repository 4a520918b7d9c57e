#include "rlhf/model/weight_file.h"

#include <array>
#include <cstring>

#include "rlhf/core/error.h"
#include "rlhf/core/mapped_file.h"
#include "rlhf/model/gguf_weights.h"
#include "rlhf/model/safetensors.h"

namespace rlhf {
namespace {

bool starts_with_magic(const std::filesystem::path& path, std::string_view magic) {
  const MappedFile file(path);
  return file.bytes().size() >= magic.size() &&
         std::memcmp(file.bytes().data(), magic.data(), magic.size()) == 0;
}

std::unique_ptr<WeightFile> open_file(const std::filesystem::path& path) {
  if (starts_with_magic(path, "GGUF")) return open_gguf_weights(path);
  return open_safetensors({path}, path);
}

std::unique_ptr<WeightFile> open_directory(const std::filesystem::path& directory) {
  if (std::filesystem::exists(directory / "model.safetensors.index.json")) {
    return open_sharded_safetensors(directory / "model.safetensors.index.json");
  }
  if (std::filesystem::exists(directory / "model.safetensors"))
    return open_file(directory / "model.safetensors");
  std::vector<std::filesystem::path> found;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    if (entry.path().extension() == ".gguf") found.push_back(entry.path());
  }
  if (found.size() == 1) return open_file(found.front());
  fail<IoError>(directory.string(),
                ": expected model.safetensors, model.safetensors.index.json or one GGUF file, found ",
                found.size(), " GGUF files",
                std::filesystem::exists(directory / "pytorch_model.bin")
                    ? " (pytorch_model.bin is not supported: convert it to safetensors)"
                    : "");
}

}  // namespace

std::int64_t TensorInfo::num_elements() const {
  std::int64_t count = 1;
  for (const std::int64_t size : shape) count *= size;
  return count;
}

std::unique_ptr<WeightFile> WeightFile::open(const std::filesystem::path& path) {
  if (!std::filesystem::exists(path)) fail<IoError>(path.string(), ": no such file or directory");
  return std::filesystem::is_directory(path) ? open_directory(path) : open_file(path);
}

void WeightFile::add_tensor(TensorInfo info) {
  if (!index_.emplace(info.name, tensors_.size()).second) {
    fail<IoError>(path_.string(), ": tensor ", info.name, " occurs twice");
  }
  tensors_.push_back(std::move(info));
}

const TensorInfo* WeightFile::find(std::string_view name) const {
  if (const auto found = index_.find(std::string(name)); found != index_.end())
    return &tensors_[found->second];
  for (const std::string_view prefix : {"model.", "transformer."}) {
    if (!name.starts_with(prefix)) continue;
    const auto found = index_.find(std::string(name.substr(prefix.size())));
    if (found != index_.end()) return &tensors_[found->second];
  }
  return nullptr;
}

template <typename T>
void WeightFile::read_as(std::string_view name, std::span<T> out) const {
  const TensorInfo* info = find(name);
  if (info == nullptr) fail<IoError>(path_.string(), ": has no tensor ", name);
  if (info->type == TensorType::kOther) {
    fail<IoError>(path_.string(), ": tensor ", name, ": expected a floating-point or quantised type");
  }
  RLHF_CHECK(static_cast<std::int64_t>(out.size()) == info->num_elements(), path_.string(), ": tensor ", name,
             " has ", info->num_elements(), " elements, the buffer ", out.size());
  decode(static_cast<std::size_t>(info - tensors_.data()), out.data());
}

void WeightFile::read(std::string_view name, std::span<float> out) const {
  read_as(name, out);
}
void WeightFile::read(std::string_view name, std::span<double> out) const {
  read_as(name, out);
}

}  // namespace rlhf

#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "rlhf/model/tensor_type.h"

namespace rlhf {

/// One stored tensor under its Hugging Face name.
struct TensorInfo {
  std::string name;
  TensorType type = TensorType::kF32;
  /// Slowest dimension first, as in Hugging Face checkpoints whatever the file format.
  std::vector<std::int64_t> shape;
  /// Size in the file.
  std::uint64_t bytes = 0;

  std::int64_t num_elements() const;
};

/// Read access to the weights of a model, whatever they are stored in. Files are memory-mapped and validated
/// completely when opened; reading is thread-safe and allocates nothing of tensor size, except for transposed
/// GGUF tensors (GPT-2).
class WeightFile {
 public:
  /// Opens a .safetensors or .gguf file (recognised by content) or a directory with model.safetensors,
  /// model.safetensors.index.json and its shards, or exactly one GGUF file.
  /// @throws IoError naming path, offset and what was expected: truncated, overlapping, out of the file,
  /// duplicate names, unknown types, counts that do not fit the file.
  static std::unique_ptr<WeightFile> open(const std::filesystem::path& directory_or_file);
  virtual ~WeightFile() = default;

  const std::vector<TensorInfo>& tensors() const { return tensors_; }
  /// The tensor of that name, or null. A checkpoint of the bare transformer, which lacks the `model.` or
  /// `transformer.` prefix, is found under the full name too.
  const TensorInfo* find(std::string_view name) const;

  /// Reads a whole tensor in row-major order. `out` must hold exactly its elements.
  /// @throws InvalidArgument for a wrong size; IoError for an unknown name or a type that holds no numbers.
  void read(std::string_view name, std::span<float> out) const;
  /// F64 tensors are exact.
  void read(std::string_view name, std::span<double> out) const;

  const std::filesystem::path& path() const { return path_; }

 protected:
  explicit WeightFile(std::filesystem::path path) : path_(std::move(path)) {}

  /// Adds a tensor; its index is what decode() gets. @throws IoError for a duplicate name.
  void add_tensor(TensorInfo info);
  virtual void decode(std::size_t index, float* out) const = 0;
  virtual void decode(std::size_t index, double* out) const = 0;

 private:
  template <typename T>
  void read_as(std::string_view name, std::span<T> out) const;

  std::filesystem::path path_;
  std::vector<TensorInfo> tensors_;
  std::unordered_map<std::string, std::size_t> index_;
};

}  // namespace rlhf

// Layout: 8 bytes header length (little-endian), a JSON object {name: {dtype, shape, data_offsets}}, then the
// data, which the tensors must cover without gaps or overlaps.
#include "rlhf/model/safetensors.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <tuple>
#include <unordered_set>

#include "rlhf/core/atomic_file.h"
#include "rlhf/core/error.h"
#include "rlhf/core/mapped_file.h"
#include "rlhf/model/json_file.h"

namespace rlhf {
namespace {

// The limit of the reference implementation; keeps a hostile length from becoming a huge JSON parse.
constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;
constexpr std::size_t kMaxSizes = 16;
constexpr std::size_t kLengthBytes = 8;

struct NamedType {
  std::string_view name;
  TensorType type;
  std::uint64_t bytes;
};
constexpr std::array<NamedType, 16> kNamedTypes{{
    {"F64", TensorType::kF64, 8},
    {"F32", TensorType::kF32, 4},
    {"F16", TensorType::kF16, 2},
    {"BF16", TensorType::kBf16, 2},
    {"I64", TensorType::kOther, 8},
    {"U64", TensorType::kOther, 8},
    {"C64", TensorType::kOther, 8},
    {"I32", TensorType::kOther, 4},
    {"U32", TensorType::kOther, 4},
    {"I16", TensorType::kOther, 2},
    {"U16", TensorType::kOther, 2},
    {"I8", TensorType::kOther, 1},
    {"U8", TensorType::kOther, 1},
    {"BOOL", TensorType::kOther, 1},
    {"F8_E4M3", TensorType::kOther, 1},
    {"F8_E5M2", TensorType::kOther, 1},
}};

struct TensorEntry {
  TensorInfo info;
  std::uint64_t begin = 0;  // offsets into the data section
  std::uint64_t end = 0;
};

const NamedType& read_type(const JsonFields& fields) {
  const std::string name = fields.text("dtype", std::nullopt);
  for (const NamedType& type : kNamedTypes) {
    if (type.name == name) return type;
  }
  fields.reject("dtype", "F64, F32, F16, BF16 or an integer type");
}

std::vector<std::int64_t> read_shape(const JsonFields& fields, std::uint64_t& elements) {
  const auto* shape = fields.find("shape");
  if (!shape || !shape->is_array() || shape->size() > kMaxSizes) {
    fields.reject("shape", concat("a list of at most ", kMaxSizes, " sizes"));
  }
  std::vector<std::int64_t> sizes;
  elements = 1;
  for (const auto& size : *shape) {
    if (!size.is_number_unsigned() || size.get<std::uint64_t>() > (std::uint64_t{1} << 40)) {
      fields.reject("shape", "sizes of 0 to 2^40");
    }
    if (__builtin_mul_overflow(elements, size.get<std::uint64_t>(), &elements) ||
        elements > (std::uint64_t{1} << 48)) {
      fields.reject("shape", "at most 2^48 elements");
    }
    sizes.push_back(size.get<std::int64_t>());
  }
  return sizes;
}

TensorEntry read_entry(const std::string& name, const nlohmann::json& value, const std::string& path) {
  const JsonFields fields(value, path, name + ": ");
  const NamedType& type = read_type(fields);
  std::uint64_t elements = 0;
  TensorEntry entry;
  entry.info = {name, type.type, read_shape(fields, elements), elements * type.bytes};
  const auto* offsets = fields.find("data_offsets");
  if (!offsets || !offsets->is_array() || offsets->size() != 2 || !(*offsets)[0].is_number_unsigned() ||
      !(*offsets)[1].is_number_unsigned()) {
    fields.reject("data_offsets", "[begin, end]");
  }
  entry.begin = (*offsets)[0];
  entry.end = (*offsets)[1];
  if (entry.end < entry.begin || entry.end - entry.begin != entry.info.bytes) {
    fields.reject("data_offsets", concat("a range of ", entry.info.bytes, " bytes (dtype times shape)"));
  }
  return entry;
}

void check_coverage(std::vector<TensorEntry>& entries, std::uint64_t data_bytes, const std::string& path) {
  std::sort(entries.begin(), entries.end(), [](const TensorEntry& a, const TensorEntry& b) {
    return std::tie(a.begin, a.end) < std::tie(b.begin, b.end);
  });
  std::uint64_t position = 0;
  for (const TensorEntry& entry : entries) {
    if (entry.begin != position) {
      fail<IoError>(path, ": tensor ", entry.info.name, ": data offset ", entry.begin, ": expected ",
                    position, entry.begin < position ? " (tensors overlap)" : " (a gap between tensors)");
    }
    position = entry.end;
  }
  if (position != data_bytes) {
    fail<IoError>(path, ": holds ", data_bytes, " bytes of tensor data, the header describes ", position,
                  position > data_bytes ? " (truncated file?)" : "");
  }
}

class SafetensorsFile final : public WeightFile {
 public:
  SafetensorsFile(const std::vector<std::filesystem::path>& files, const std::filesystem::path& name)
      : WeightFile(name) {
    for (const auto& file : files) add_file(file);
  }

 private:
  void add_file(const std::filesystem::path& path) {
    const MappedFile& file = files_.emplace_back(path);
    const auto bytes = file.bytes();
    const std::string name = path.string();
    if (bytes.size() < kLengthBytes)
      fail<IoError>(name, ": offset 0: expected a safetensors header, the file has ", bytes.size(), " bytes");
    std::uint64_t header = 0;
    std::memcpy(&header, bytes.data(), kLengthBytes);
    if (header > kMaxHeaderBytes || header > bytes.size() - kLengthBytes) {
      fail<IoError>(name, ": offset 0: header length ", header, ": expected at most ",
                    std::min<std::uint64_t>(kMaxHeaderBytes, bytes.size() - kLengthBytes),
                    " (no safetensors file, or truncated)");
    }
    const auto* text = reinterpret_cast<const char*>(bytes.data()) + kLengthBytes;
    const nlohmann::json json = parse_json({text, header}, name + ": header");
    if (!json.is_object()) fail<IoError>(name, ": offset 8: expected a JSON object");
    std::vector<TensorEntry> entries;
    for (const auto& [key, value] : json.items()) {
      if (key != "__metadata__") entries.push_back(read_entry(key, value, name));
    }
    check_coverage(entries, bytes.size() - kLengthBytes - header, name);
    for (TensorEntry& entry : entries) {
      data_.push_back(bytes.data() + kLengthBytes + header + entry.begin);
      add_tensor(std::move(entry.info));
    }
  }

  void decode(std::size_t index, float* out) const override { decode_into(index, out); }
  void decode(std::size_t index, double* out) const override { decode_into(index, out); }
  template <typename T>
  void decode_into(std::size_t index, T* out) const {
    const TensorInfo& info = tensors()[index];
    dequantise(info.type, data_[index], static_cast<std::size_t>(info.num_elements()), out);
  }

  std::vector<MappedFile> files_;
  std::vector<const std::byte*> data_;
};

std::size_t count_of(const OutputTensor& tensor) {
  return std::visit([](const auto& values) { return values.size(); }, tensor.values);
}

std::string make_header(std::span<const OutputTensor> tensors) {
  nlohmann::ordered_json header;
  header["__metadata__"] = {{"format", "pt"}};
  std::uint64_t position = 0;
  std::unordered_set<std::string_view> names;
  for (const OutputTensor& tensor : tensors) {
    RLHF_CHECK(tensor.type <= TensorType::kBf16, "save_safetensors: ", tensor.name, ": cannot write type ",
               tensor_type_name(tensor.type));
    RLHF_CHECK(names.insert(tensor.name).second, "save_safetensors: tensor ", tensor.name, " occurs twice");
    std::int64_t elements = 1;
    for (const std::int64_t size : tensor.shape) elements *= size;
    RLHF_CHECK(elements == static_cast<std::int64_t>(count_of(tensor)), "save_safetensors: ", tensor.name,
               ": the shape has ", elements, " elements, the data ", count_of(tensor));
    const std::uint64_t bytes = count_of(tensor) * block_layout(tensor.type).bytes;
    header[tensor.name] = {{"dtype", tensor_type_name(tensor.type)},
                           {"shape", tensor.shape},
                           {"data_offsets", {position, position + bytes}}};
    position += bytes;
  }
  std::string text = header.dump();
  // Padding with spaces aligns the data to 8 bytes, as the reference writer does.
  text.resize((text.size() + 7) / 8 * 8, ' ');
  return text;
}

template <typename Stored, typename T, typename Convert>
void write_converted(AtomicFile& file, std::span<const T> values, Convert convert) {
  std::vector<Stored> chunk(std::min<std::size_t>(values.size(), 1 << 16));
  for (std::size_t done = 0; done < values.size();) {
    const std::size_t now = std::min(chunk.size(), values.size() - done);
    for (std::size_t i = 0; i < now; ++i) chunk[i] = convert(values[done + i]);
    file.write(chunk.data(), now * sizeof(chunk[0]));
    done += now;
  }
}

template <typename T>
void write_values(AtomicFile& file, std::span<const T> values, TensorType type) {
  switch (type) {
    case TensorType::kF64:
      return write_converted<double>(file, values, [](T value) { return static_cast<double>(value); });
    case TensorType::kF16:
      return write_converted<std::uint16_t>(file, values,
                                            [](T value) { return float_to_half(static_cast<float>(value)); });
    case TensorType::kBf16:
      return write_converted<std::uint16_t>(
          file, values, [](T value) { return float_to_bfloat16(static_cast<float>(value)); });
    default:
      return write_converted<float>(file, values, [](T value) { return static_cast<float>(value); });
  }
}

}  // namespace

std::unique_ptr<WeightFile> open_safetensors(const std::vector<std::filesystem::path>& files,
                                             const std::filesystem::path& name) {
  return std::make_unique<SafetensorsFile>(files, name);
}

std::unique_ptr<WeightFile> open_sharded_safetensors(const std::filesystem::path& index) {
  const nlohmann::json json = read_json_file(index);
  const JsonFields fields(json, index.string());
  const auto* map = fields.find("weight_map");
  if (!map || !map->is_object() || map->empty()) fields.reject("weight_map", "an object {tensor: file}");
  std::vector<std::string> names;
  for (const auto& [tensor, file] : map->items()) {
    const std::string name = file.is_string() ? file.get<std::string>() : "";
    // A shard is a plain name beside the index: never a path that leads elsewhere.
    if (name.empty() || name == ".." || name.find('/') != std::string::npos) {
      fail<IoError>(index.string(), ": weight_map.", tensor, ": ", file.dump(),
                    ": expected a file name in the same directory");
    }
    if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
  }
  std::sort(names.begin(), names.end());
  std::vector<std::filesystem::path> files;
  for (const std::string& name : names) files.push_back(index.parent_path() / name);
  auto weights = open_safetensors(files, index);
  for (const auto& [tensor, file] : map->items()) {
    if (weights->find(tensor) == nullptr) {
      fail<IoError>(index.string(), ": weight_map.", tensor, ": expected this tensor in ",
                    file.get<std::string>());
    }
  }
  return weights;
}

void save_safetensors(const std::filesystem::path& path, std::span<const OutputTensor> tensors) {
  const std::string header = make_header(tensors);
  const std::uint64_t length = header.size();
  AtomicFile file(path);
  file.write(&length, sizeof(length));
  file.write(header);
  for (const OutputTensor& tensor : tensors) {
    std::visit([&](const auto& values) { write_values(file, values, tensor.type); }, tensor.values);
  }
  file.commit();
}

}  // namespace rlhf

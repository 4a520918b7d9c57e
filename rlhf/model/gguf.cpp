#include "rlhf/model/gguf.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "rlhf/core/error.h"
#include "rlhf/model/utf8.h"

namespace rlhf {
namespace {

constexpr std::uint64_t kMaxTensors = 1 << 20;
constexpr std::uint64_t kMaxKeys = 1 << 20;
constexpr std::uint64_t kMaxNameBytes = 65535;
constexpr std::uint64_t kMaxAlignment = 1 << 20;
constexpr std::uint32_t kMaxDimensions = 4;

enum class ValueType : std::uint32_t {
  kUint8,
  kInt8,
  kUint16,
  kInt16,
  kUint32,
  kInt32,
  kFloat32,
  kBool,
  kString,
  kArray,
  kUint64,
  kInt64,
  kFloat64
};

struct StoredType {
  std::uint32_t id;
  TensorType type;
};
constexpr std::array<StoredType, 12> kStoredTypes{{{0, TensorType::kF32},
                                                   {1, TensorType::kF16},
                                                   {2, TensorType::kQ4_0},
                                                   {3, TensorType::kQ4_1},
                                                   {6, TensorType::kQ5_0},
                                                   {7, TensorType::kQ5_1},
                                                   {8, TensorType::kQ8_0},
                                                   {12, TensorType::kQ4_K},
                                                   {13, TensorType::kQ5_K},
                                                   {14, TensorType::kQ6_K},
                                                   {28, TensorType::kF64},
                                                   {30, TensorType::kBf16}}};

}  // namespace

/// Reads the header front to back. Every count is compared with the bytes that are left before memory is
/// reserved.
class GgufParser {
 public:
  explicit GgufParser(GgufFile& file) : file_(file), bytes_(file.file_.bytes()) {}

  void parse() {
    if (bytes_.size() < 4 || std::memcmp(bytes_.data(), "GGUF", 4) != 0) error(0, "expected the magic GGUF");
    position_ = 4;
    const auto version = take<std::uint32_t>();
    if (version != 2 && version != 3) error(4, concat("GGUF version ", version, ": expected 2 or 3"));
    const std::uint64_t num_tensors = take_count("tensors", kMaxTensors, 24);
    const std::uint64_t num_keys = take_count("metadata keys", kMaxKeys, 12);
    for (std::uint64_t i = 0; i < num_keys; ++i) parse_key();
    for (std::uint64_t i = 0; i < num_tensors; ++i) parse_tensor();
    place_tensors();
  }

 private:
  [[noreturn]] void error(std::uint64_t offset, const std::string& message) const {
    fail<IoError>(file_.path().string(), ": offset ", offset, ": ", message);
  }

  std::uint64_t left() const { return bytes_.size() - position_; }

  template <typename T>
  T take() {
    if (left() < sizeof(T)) error(position_, concat("truncated: expected ", sizeof(T), " more bytes"));
    T value;
    std::memcpy(&value, bytes_.data() + position_, sizeof(T));
    position_ += sizeof(T);
    return value;
  }

  std::uint64_t take_count(std::string_view what, std::uint64_t limit, std::uint64_t least_bytes_each) {
    const std::uint64_t offset = position_;
    const auto count = take<std::uint64_t>();
    if (count > limit || count > left() / least_bytes_each) {
      error(offset, concat(count, " ", what, ": more than the ", left(), " bytes left can hold (at most ",
                           limit, ")"));
    }
    return count;
  }

  std::string_view take_string(std::uint64_t limit) {
    const std::uint64_t offset = position_;
    const auto size = take<std::uint64_t>();
    if (size > left() || size > limit) {
      error(offset, concat("string of ", size, " bytes: expected at most ", std::min(limit, left())));
    }
    const std::string_view text(reinterpret_cast<const char*>(bytes_.data()) + position_, size);
    if (const auto bad = utf8::find_invalid(text)) error(position_ + *bad, "expected UTF-8 text");
    position_ += size;
    return text;
  }

  GgufValue take_value(ValueType type) {
    switch (type) {
      case ValueType::kUint8:
        return std::int64_t{take<std::uint8_t>()};
      case ValueType::kInt8:
        return std::int64_t{take<std::int8_t>()};
      case ValueType::kUint16:
        return std::int64_t{take<std::uint16_t>()};
      case ValueType::kInt16:
        return std::int64_t{take<std::int16_t>()};
      case ValueType::kUint32:
        return std::int64_t{take<std::uint32_t>()};
      case ValueType::kInt32:
        return std::int64_t{take<std::int32_t>()};
      case ValueType::kFloat32:
        return static_cast<double>(take<float>());
      case ValueType::kBool:
        return take_bool();
      case ValueType::kString:
        return take_string(left());
      case ValueType::kArray:
        return take_array();
      case ValueType::kUint64:
        return take_uint64();
      case ValueType::kInt64:
        return take<std::int64_t>();
      case ValueType::kFloat64:
        return take<double>();
    }
    error(position_, concat("metadata value type ", static_cast<std::uint32_t>(type), ": expected 0 to 12"));
  }

  bool take_bool() {
    const auto value = take<std::uint8_t>();
    if (value > 1) error(position_ - 1, concat("boolean ", int{value}, ": expected 0 or 1"));
    return value == 1;
  }

  std::int64_t take_uint64() {
    const auto value = take<std::uint64_t>();
    if (value > static_cast<std::uint64_t>(INT64_MAX)) error(position_ - 8, "integer beyond 63 bits");
    return static_cast<std::int64_t>(value);
  }

  GgufArray take_array() {
    const std::uint64_t offset = position_;
    const auto type = static_cast<ValueType>(take<std::uint32_t>());
    if (type == ValueType::kArray || type > ValueType::kFloat64) {
      error(offset, concat("array of type ", static_cast<std::uint32_t>(type),
                           ": expected numbers, booleans or strings"));
    }
    const std::uint64_t count = take_count("array elements", UINT64_MAX, least_bytes(type));
    if (type == ValueType::kString) {
      std::vector<std::string_view> strings(count);
      for (auto& text : strings) text = take_string(left());
      return strings;
    }
    if (type == ValueType::kFloat32 || type == ValueType::kFloat64) {
      std::vector<double> numbers(count);
      for (auto& number : numbers) number = std::get<double>(take_value(type));
      return numbers;
    }
    std::vector<std::int64_t> integers(count);
    for (auto& integer : integers)
      integer = type == ValueType::kBool ? take_bool() : std::get<std::int64_t>(take_value(type));
    return integers;
  }

  static std::uint64_t least_bytes(ValueType type) {
    constexpr std::array<std::uint64_t, 13> kBytes{1, 1, 2, 2, 4, 4, 4, 1, 8, 1, 8, 8, 8};
    return kBytes[static_cast<std::size_t>(type)];
  }

  void parse_key() {
    const std::uint64_t offset = position_;
    const std::string key(take_string(kMaxNameBytes));
    const auto type = static_cast<ValueType>(take<std::uint32_t>());
    if (!file_.metadata_.emplace(key, take_value(type)).second)
      error(offset, concat("metadata key ", key, " occurs twice"));
  }

  void parse_tensor() {
    const std::uint64_t offset = position_;
    GgufTensor tensor;
    tensor.name = take_string(kMaxNameBytes);
    const auto dimensions = take<std::uint32_t>();
    if (dimensions == 0 || dimensions > kMaxDimensions) {
      error(offset,
            concat("tensor ", tensor.name, ": ", dimensions, " dimensions: expected 1 to ", kMaxDimensions));
    }
    std::uint64_t elements = 1;
    for (std::uint32_t i = 0; i < dimensions; ++i) {
      const auto size = take<std::uint64_t>();
      if (size == 0 || size > (std::uint64_t{1} << 40) || __builtin_mul_overflow(elements, size, &elements) ||
          elements > (std::uint64_t{1} << 48)) {
        error(position_ - 8, concat("tensor ", tensor.name, ": size ", size,
                                    ": expected 1 to 2^40, at most 2^48 elements in all"));
      }
      tensor.shape.insert(tensor.shape.begin(), static_cast<std::int64_t>(size));
    }
    tensor.type = take_tensor_type(tensor.name);
    const BlockLayout layout = block_layout(tensor.type);
    if (static_cast<std::uint64_t>(tensor.shape.back()) % layout.elements != 0) {
      error(offset,
            concat("tensor ", tensor.name, ": row length ", tensor.shape.back(), ": expected a multiple of ",
                   layout.elements, " for ", tensor_type_name(tensor.type)));
    }
    offsets_.push_back(take<std::uint64_t>());
    sizes_.push_back(elements / layout.elements * layout.bytes);
    file_.tensors_.push_back(std::move(tensor));
  }

  TensorType take_tensor_type(const std::string& name) {
    const auto id = take<std::uint32_t>();
    std::string known;
    for (const StoredType& stored : kStoredTypes) {
      if (stored.id == id) return stored.type;
      known += concat(known.empty() ? "" : ", ", tensor_type_name(stored.type));
    }
    error(position_ - 4,
          concat("tensor ", name, ": type ", id, " is not supported: expected one of ", known));
  }

  void place_tensors() {
    const auto alignment =
        static_cast<std::uint64_t>(file_.integer("general.alignment", 32, 1, kMaxAlignment));
    if ((alignment & (alignment - 1)) != 0) file_.reject("general.alignment", "a power of two");
    // A file without tensors may end right after its header.
    const std::uint64_t aligned = (position_ + alignment - 1) / alignment * alignment;
    const std::uint64_t start = std::min<std::uint64_t>(aligned, bytes_.size());
    const std::uint64_t data_bytes = bytes_.size() - start;
    std::vector<std::size_t> order(offsets_.size());
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::sort(order.begin(), order.end(),
              [&](std::size_t a, std::size_t b) { return offsets_[a] < offsets_[b]; });
    std::uint64_t free_from = 0;
    for (const std::size_t i : order) {
      GgufTensor& tensor = file_.tensors_[i];
      const std::string where = concat("tensor ", tensor.name, ": data offset ", offsets_[i]);
      if (offsets_[i] % alignment != 0) error(start, concat(where, ": expected a multiple of ", alignment));
      if (offsets_[i] > data_bytes || sizes_[i] > data_bytes - offsets_[i]) {
        error(start, concat(where, ": needs ", sizes_[i], " bytes, the file has ", data_bytes,
                            " bytes of tensor data (truncated?)"));
      }
      if (offsets_[i] < free_from) error(start, concat(where, ": overlaps the tensor before it"));
      free_from = offsets_[i] + sizes_[i];
      tensor.data = bytes_.subspan(start + offsets_[i], sizes_[i]);
    }
  }

  GgufFile& file_;
  std::span<const std::byte> bytes_;
  std::uint64_t position_ = 0;
  std::vector<std::uint64_t> offsets_;
  std::vector<std::uint64_t> sizes_;
};

std::shared_ptr<const GgufFile> GgufFile::open(const std::filesystem::path& path) {
  std::shared_ptr<GgufFile> file(new GgufFile(path));
  GgufParser(*file).parse();
  return file;
}

const GgufTensor* GgufFile::find_tensor(std::string_view name) const {
  const auto found = std::find_if(tensors_.begin(), tensors_.end(),
                                  [&](const GgufTensor& tensor) { return tensor.name == name; });
  return found == tensors_.end() ? nullptr : &*found;
}

const GgufValue* GgufFile::find(std::string_view key) const {
  const auto found = metadata_.find(key);
  return found == metadata_.end() ? nullptr : &found->second;
}

void GgufFile::reject(std::string_view key, std::string_view expected) const {
  std::string shown = "missing";
  if (const GgufValue* value = find(key)) {
    if (const auto* integer = std::get_if<std::int64_t>(value))
      shown = std::to_string(*integer);
    else if (const auto* number = std::get_if<double>(value))
      shown = concat(*number);
    else if (const auto* text = std::get_if<std::string_view>(value))
      shown = text->substr(0, 80);
    else
      shown = "present with another type";
  }
  fail<IoError>(path().string(), ": metadata ", key, ": ", shown, ": expected ", expected);
}

std::int64_t GgufFile::integer(std::string_view key, std::optional<std::int64_t> fallback, std::int64_t low,
                               std::int64_t high) const {
  const GgufValue* value = find(key);
  if (value == nullptr && fallback) return *fallback;
  const auto* integer = value ? std::get_if<std::int64_t>(value) : nullptr;
  if (!integer || *integer < low || *integer > high)
    reject(key, concat("an integer in [", low, ", ", high, "]"));
  return *integer;
}

double GgufFile::number(std::string_view key, std::optional<double> fallback) const {
  const GgufValue* value = find(key);
  if (value == nullptr && fallback) return *fallback;
  const auto* number = value ? std::get_if<double>(value) : nullptr;
  if (!number || !std::isfinite(*number)) reject(key, "a finite floating-point number");
  return *number;
}

bool GgufFile::flag(std::string_view key, bool fallback) const {
  const GgufValue* value = find(key);
  if (value == nullptr) return fallback;
  if (!std::holds_alternative<bool>(*value)) reject(key, "a boolean");
  return std::get<bool>(*value);
}

std::string_view GgufFile::text(std::string_view key, std::optional<std::string_view> fallback) const {
  const GgufValue* value = find(key);
  if (value == nullptr && fallback) return *fallback;
  if (!value || !std::holds_alternative<std::string_view>(*value)) reject(key, "a string");
  return std::get<std::string_view>(*value);
}

std::span<const std::string_view> GgufFile::strings(std::string_view key) const {
  const GgufValue* value = find(key);
  if (value == nullptr) return {};
  const auto* array = std::get_if<GgufArray>(value);
  const auto* strings = array ? std::get_if<std::vector<std::string_view>>(array) : nullptr;
  if (!strings) reject(key, "an array of strings");
  return *strings;
}

std::span<const std::int64_t> GgufFile::integers(std::string_view key) const {
  const GgufValue* value = find(key);
  if (value == nullptr) return {};
  const auto* array = std::get_if<GgufArray>(value);
  const auto* integers = array ? std::get_if<std::vector<std::int64_t>>(array) : nullptr;
  if (!integers) reject(key, "an array of integers");
  return *integers;
}

}  // namespace rlhf

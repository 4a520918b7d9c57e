#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "rlhf/core/mapped_file.h"
#include "rlhf/model/model_config.h"
#include "rlhf/model/tensor_type.h"

namespace rlhf {

/// A metadata array: its strings, or its numbers (integers and booleans exactly as int64, floats as double).
using GgufArray = std::variant<std::vector<std::string_view>, std::vector<std::int64_t>, std::vector<double>>;
/// A metadata value. Strings are views into the mapped file.
using GgufValue = std::variant<bool, std::int64_t, double, std::string_view, GgufArray>;

/// A tensor of a GGUF file as it is stored there: GGUF's name and llama.cpp's row order.
struct GgufTensor {
  std::string name;
  TensorType type = TensorType::kF32;
  /// Slowest dimension first (the file lists them fastest first).
  std::vector<std::int64_t> shape;
  std::span<const std::byte> data;
};

/// A parsed and validated GGUF file, version 2 or 3 (memory-mapped; immutable; thread-safe).
/// Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md.
class GgufFile {
 public:
  /// @throws IoError naming path and offset: bad magic or version, truncated, counts that exceed the file,
  /// unknown types, duplicate keys or tensors, bad UTF-8, unaligned, overlapping or out-of-file tensors.
  static std::shared_ptr<const GgufFile> open(const std::filesystem::path& path);

  const std::map<std::string, GgufValue, std::less<>>& metadata() const { return metadata_; }
  const std::vector<GgufTensor>& tensors() const { return tensors_; }
  const GgufTensor* find_tensor(std::string_view name) const;
  const std::filesystem::path& path() const { return file_.path(); }

  bool has(std::string_view key) const { return metadata_.find(key) != metadata_.end(); }
  /// Typed access; `std::nullopt` as fallback makes the key mandatory.
  /// @throws IoError naming path, key and the expected type or range.
  std::int64_t integer(std::string_view key, std::optional<std::int64_t> fallback, std::int64_t low,
                       std::int64_t high) const;
  double number(std::string_view key, std::optional<double> fallback) const;
  bool flag(std::string_view key, bool fallback) const;
  std::string_view text(std::string_view key, std::optional<std::string_view> fallback) const;
  /// Empty when the key is absent.
  std::span<const std::string_view> strings(std::string_view key) const;
  std::span<const std::int64_t> integers(std::string_view key) const;

 private:
  explicit GgufFile(const std::filesystem::path& path) : file_(path) {}
  const GgufValue* find(std::string_view key) const;
  [[noreturn]] void reject(std::string_view key, std::string_view expected) const;
  friend class GgufParser;

  MappedFile file_;
  std::map<std::string, GgufValue, std::less<>> metadata_;
  std::vector<GgufTensor> tensors_;
};

/// The model configuration in a GGUF file's metadata (architectures llama, qwen2, qwen3, gpt2, gemma2,
/// smollm3).
/// @throws IoError naming path, key and value.
ModelConfig gguf_model_config(const GgufFile& file);

}  // namespace rlhf

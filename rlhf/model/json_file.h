#pragma once

#include <cstdint>
#include <filesystem>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "rlhf/core/atomic_file.h"

namespace rlhf {

/// Parses JSON text that came from outside: rejects bad UTF-8, trailing text, duplicate keys of one object
/// and nesting deeper than 256 levels.
/// @param source names the text in messages (a path, `path:line`).
/// @throws IoError with source, byte offset and what was expected.
nlohmann::json parse_json(std::string_view text, const std::string& source);
/// The same with the order of keys kept (chat messages and tools: their order is visible in rendered text).
nlohmann::ordered_json parse_ordered_json(std::string_view text, const std::string& source);

/// read_text_file, then parse_json.
nlohmann::json read_json_file(const std::filesystem::path& path);

/// Typed access to the keys of one JSON object; every error names the source, the key, the value and what was
/// expected. A key that holds null counts as absent.
class JsonFields {
 public:
  /// @throws IoError unless `object` is a JSON object. `object` must outlive this.
  JsonFields(const nlohmann::json& object, std::string source, std::string key_prefix = "");

  /// The value under the first of `keys` that is present and not null.
  const nlohmann::json* find(std::string_view key) const;
  /// Whether the key is present and holds null.
  bool is_null(std::string_view key) const;
  const nlohmann::json* find_any(std::initializer_list<std::string_view> keys) const;

  /// An integer in [low, high]. `std::nullopt` as default makes the key mandatory.
  std::int64_t integer(std::string_view key, std::optional<std::int64_t> fallback, std::int64_t low,
                       std::int64_t high) const;
  /// A finite number in [low, high].
  double number(std::string_view key, std::optional<double> fallback, double low, double high) const;
  bool flag(std::string_view key, bool fallback) const;
  std::string text(std::string_view key, std::optional<std::string> fallback) const;

  [[noreturn]] void reject(std::string_view key, std::string_view expected) const;
  const std::string& source() const { return source_; }

 private:
  const nlohmann::json& object_;
  std::string source_;
  std::string prefix_;
};

}  // namespace rlhf

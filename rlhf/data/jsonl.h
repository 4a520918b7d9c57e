#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>

#include <nlohmann/json_fwd.hpp>

namespace rlhf {

/// Reads a JSONL file one object at a time; memory is bounded by the longest line. Blank lines are skipped, a
/// byte order mark and CRLF line ends are accepted.
class JsonlReader {
 public:
  /// @throws IoError when the file cannot be opened.
  explicit JsonlReader(std::filesystem::path path);

  /// Sets `value` to the next object; returns false at the end of the file.
  /// @throws IoError `path:line: ...` for text that is no JSON object, and for lines over 16 MiB.
  bool next(nlohmann::json& value);

  /// Line of the last object, from 1.
  std::int64_t line() const { return line_; }
  /// Returns `path:line` of the last object.
  std::string where() const;

 private:
  bool read_line(std::string& text);

  std::filesystem::path path_;
  std::ifstream file_;
  std::int64_t line_ = 0;
};

/// Calls `visit` with every object of a JSONL file. An InvalidArgument that it throws becomes an IoError with
/// `path:line` in front. @throws IoError, also when the file holds no object at all.
void for_each_json_line(const std::filesystem::path& path,
                        const std::function<void(const nlohmann::json&, std::int64_t line)>& visit);

}  // namespace rlhf

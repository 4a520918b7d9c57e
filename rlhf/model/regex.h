#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace rlhf {

/// A compiled Unicode regular expression over UTF-8, in the dialect of tokenizer.json patterns. `\s` and `\S`
/// mean the Unicode White_Space property. Immutable and thread-safe.
class Regex {
 public:
  /// @throws IoError naming `source`, the pattern and the position of the problem.
  Regex(const std::string& pattern, const std::string& source);
  ~Regex();
  Regex(Regex&&) noexcept;
  Regex& operator=(Regex&&) noexcept;

  /// Byte ranges [begin, end) of the non-empty matches, left to right. `text` must be valid UTF-8.
  /// @throws IoError when the pattern needs unreasonable work on this text.
  std::vector<std::pair<std::size_t, std::size_t>> find_all(std::string_view text) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace rlhf

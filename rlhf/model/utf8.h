#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

/// UTF-8 text as sequences of code points, with the conventions of Rust's and Python's decoders.
namespace rlhf::utf8 {

/// Result of looking at the first bytes of a text.
struct Decoded {
  /// The code point; U+FFFD when the bytes are no UTF-8.
  char32_t code_point = 0;
  /// Bytes consumed (at least 1): of the code point, or of the longest prefix that could have begun one
  /// ("maximal subpart", Unicode chapter 3.9), which one U+FFFD replaces.
  std::size_t size = 1;
  bool valid = false;
  /// The text ends inside a code point that is valid so far.
  bool truncated = false;
};
/// Decodes at the beginning of a non-empty text.
Decoded decode(std::string_view text);

/// Byte offset of the first thing that is not UTF-8.
std::optional<std::size_t> find_invalid(std::string_view text);
/// Replaces each maximal subpart of an ill-formed sequence by U+FFFD.
std::string replace_invalid(std::string_view text);

void append(std::string& out, char32_t code_point);
/// The code points of valid UTF-8 (ill-formed parts become U+FFFD).
std::u32string to_code_points(std::string_view text);
std::string from_code_points(std::u32string_view text);
/// Number of code points.
std::size_t length(std::string_view text);

/// Python's str.isspace, the Unicode White_Space property plus U+001C to U+001F.
bool is_space(char32_t code_point);
/// Unicode White_Space (Rust's char::is_whitespace).
bool is_white_space(char32_t code_point);

}  // namespace rlhf::utf8

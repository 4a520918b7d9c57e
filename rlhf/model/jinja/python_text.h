#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "rlhf/model/jinja/value.h"

/// Python's str methods on UTF-8 text. Positions count code points.
namespace rlhf::jinja::python {

/// repr() of a string.
std::string quoted(std::string_view text);

std::string upper(std::string_view text);
std::string lower(std::string_view text);
std::string swap_case(std::string_view text);
/// First character upper, the rest lower.
std::string capitalize(std::string_view text);
/// str.title(): each run of letters begins with an upper-case letter.
std::string title(std::string_view text);

/// Which ends of a text an operation works on.
enum class Side { kBoth, kLeft, kRight };
/// Without `characters`: white space.
std::string strip(std::string_view text, std::optional<std::string_view> characters, Side side);

/// split() without separator: at runs of white space. `limit` < 0: no limit.
std::vector<std::string> split_white_space(std::string_view text, std::int64_t limit);
std::vector<std::string> rsplit_white_space(std::string_view text, std::int64_t limit);
/// `separator` must not be empty.
std::vector<std::string> split(std::string_view text, std::string_view separator, std::int64_t limit);
std::vector<std::string> rsplit(std::string_view text, std::string_view separator, std::int64_t limit);
std::vector<std::string> split_lines(std::string_view text, bool keep_ends = false);

/// `count` < 0: all. @throws TemplateError when the result would be larger than the limit of texts.
std::string replace(std::string_view text, std::string_view old_text, std::string_view new_text,
                    std::int64_t count);
/// Code point position of the first (last) occurrence, -1 when absent.
std::int64_t find(std::string_view text, std::string_view part);
std::int64_t rfind(std::string_view text, std::string_view part);
/// Number of occurrences that do not overlap.
std::int64_t count(std::string_view text, std::string_view part);

/// Pads with `fill` (one code point) to `width` code points.
std::string pad_left(std::string_view text, std::int64_t width, std::string_view fill);
std::string pad_right(std::string_view text, std::int64_t width, std::string_view fill);
std::string center(std::string_view text, std::int64_t width, std::string_view fill);

enum class CharacterClass { kAlpha, kDigit, kDecimal, kNumeric, kAlnum, kSpace, kAscii };
/// isalpha(), isdigit()...: non-empty and all characters are of that class (kAscii: may be empty).
bool all_of_class(std::string_view text, CharacterClass character_class);
/// islower(), isupper(): some cased character, and all of them that way.
bool is_lower(std::string_view text);
bool is_upper(std::string_view text);

/// Largest text a template may build, in bytes.
constexpr std::size_t kMaxTextBytes = std::size_t{64} << 20;
/// @throws TemplateError when `bytes` is more than kMaxTextBytes.
void check_size(std::size_t bytes);

/// `format % arguments`. @throws TemplateError
std::string percent_format(std::string_view format, const Value& arguments);
/// `format.format(...)`: fields with names, positions and format specifications. @throws TemplateError
std::string brace_format(std::string_view format, const Arguments& arguments);
/// round() to a number of decimals, ties to even.
double round_half_even(double value, std::int64_t decimals);

}  // namespace rlhf::jinja::python

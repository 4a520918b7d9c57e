#include "rlhf/model/jinja/python_text.h"

#include <utf8proc.h>

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "rlhf/model/utf8.h"

namespace rlhf::jinja::python {
namespace {

using utf8proc_cp = utf8proc_int32_t;

// The longer forms that the simple case mapping lacks and that occur in ordinary text.
constexpr char32_t kSharpS = 0xDF;

std::string map_characters(std::string_view text, utf8proc_cp (*map)(utf8proc_cp)) {
  std::string out;
  out.reserve(text.size());
  for (const char32_t c : utf8::to_code_points(text)) {
    utf8::append(out, static_cast<char32_t>(map(static_cast<utf8proc_cp>(c))));
  }
  return out;
}

utf8proc_category_t category(char32_t c) {
  return utf8proc_category(static_cast<utf8proc_cp>(c));
}

bool is_letter(char32_t c) {
  const auto kind = category(c);
  return kind >= UTF8PROC_CATEGORY_LU && kind <= UTF8PROC_CATEGORY_LO;
}

// Characters that have a case; title-case letters count as upper.
bool is_upper_letter(char32_t c) {
  return utf8proc_isupper(static_cast<utf8proc_cp>(c)) != 0;
}
bool is_lower_letter(char32_t c) {
  return utf8proc_islower(static_cast<utf8proc_cp>(c)) != 0;
}

bool is_printable(char32_t c) {
  switch (category(c)) {
    case UTF8PROC_CATEGORY_CN:
    case UTF8PROC_CATEGORY_CC:
    case UTF8PROC_CATEGORY_CF:
    case UTF8PROC_CATEGORY_CS:
    case UTF8PROC_CATEGORY_CO:
    case UTF8PROC_CATEGORY_ZS:
    case UTF8PROC_CATEGORY_ZL:
    case UTF8PROC_CATEGORY_ZP:
      return c == ' ';
    default:
      return true;
  }
}

bool is_line_end(char32_t c) {
  return (c >= 0x0A && c <= 0x0D) || (c >= 0x1C && c <= 0x1E) || c == 0x85 || c == 0x2028 || c == 0x2029;
}

std::string escape_code(char32_t c) {
  char buffer[16];
  std::snprintf(buffer, sizeof(buffer),
                c < 0x100     ? "\\x%02x"
                : c < 0x10000 ? "\\u%04x"
                              : "\\U%08x",
                static_cast<unsigned>(c));
  return buffer;
}

std::int64_t code_points_before(std::string_view text, std::size_t byte) {
  return byte == std::string_view::npos ? -1 : static_cast<std::int64_t>(utf8::length(text.substr(0, byte)));
}

std::string repeat(std::string_view fill, std::int64_t times) {
  std::string out;
  if (times <= 0) return out;
  check_size(static_cast<std::size_t>(times) > kMaxTextBytes ? SIZE_MAX
                                                             : fill.size() * static_cast<std::size_t>(times));
  for (std::int64_t i = 0; i < times; ++i) out += fill;
  return out;
}

}  // namespace

void check_size(std::size_t bytes) {
  if (bytes > kMaxTextBytes) fail<TemplateError>("a text would be larger than ", kMaxTextBytes, " bytes");
}

std::string quoted(std::string_view text) {
  const bool has_single = text.find('\'') != std::string_view::npos,
             has_double = text.find('"') != std::string_view::npos;
  const char quote = has_single && !has_double ? '"' : '\'';
  std::string out(1, quote);
  for (const char32_t c : utf8::to_code_points(text)) {
    if (c == '\n') {
      out += "\\n";
    } else if (c == '\r') {
      out += "\\r";
    } else if (c == '\t') {
      out += "\\t";
    } else if (c == '\\' || c == static_cast<char32_t>(quote)) {
      out += '\\';
      out += static_cast<char>(c);
    } else if (is_printable(c)) {
      utf8::append(out, c);
    } else {
      out += escape_code(c);
    }
  }
  return out + quote;
}

std::string upper(std::string_view text) {
  std::string sharp;
  utf8::append(sharp, kSharpS);
  // Replaced first: the simple mapping knows a capital sharp s only.
  const bool has_sharp = text.find(sharp) != std::string_view::npos;
  return map_characters(has_sharp ? replace(text, sharp, "SS", -1) : std::string(text), utf8proc_toupper);
}

std::string lower(std::string_view text) {
  return map_characters(text, utf8proc_tolower);
}

namespace {

std::string title_case(std::string_view character) {
  const std::string simple = map_characters(character, utf8proc_totitle);
  // Letters without a title form of their own use the capital one.
  return simple == character ? upper(character) : simple;
}

}  // namespace

std::string swap_case(std::string_view text) {
  std::string out;
  for (const char32_t c : utf8::to_code_points(text)) {
    std::string one;
    utf8::append(one, c);
    out += is_upper_letter(c) ? lower(one) : upper(one);
  }
  return out;
}

std::string capitalize(std::string_view text) {
  if (text.empty()) return "";
  const std::size_t first = utf8::decode(text).size;
  return title_case(text.substr(0, first)) + lower(text.substr(first));
}

std::string title(std::string_view text) {
  std::string out;
  bool inside = false;
  for (const char32_t c : utf8::to_code_points(text)) {
    std::string one;
    utf8::append(one, c);
    out += inside ? lower(one) : title_case(one);
    inside = is_upper_letter(c) || is_lower_letter(c);
  }
  return out;
}

std::string strip(std::string_view text, std::optional<std::string_view> characters, Side side) {
  const std::u32string points = utf8::to_code_points(text);
  const std::u32string set = utf8::to_code_points(characters.value_or(""));
  const auto goes = [&](char32_t c) {
    return characters ? set.find(c) != std::u32string::npos : utf8::is_space(c);
  };
  std::size_t begin = 0, end = points.size();
  if (side != Side::kRight) {
    while (begin < end && goes(points[begin])) ++begin;
  }
  if (side != Side::kLeft) {
    while (end > begin && goes(points[end - 1])) --end;
  }
  return utf8::from_code_points(std::u32string_view(points).substr(begin, end - begin));
}

std::vector<std::string> split_white_space(std::string_view text, std::int64_t limit) {
  const std::u32string points = utf8::to_code_points(text);
  std::vector<std::string> parts;
  std::size_t position = 0;
  const auto skip_space = [&] {
    while (position < points.size() && utf8::is_space(points[position])) ++position;
  };
  for (skip_space(); position < points.size(); skip_space()) {
    const std::size_t begin = position;
    if (limit >= 0 && static_cast<std::int64_t>(parts.size()) == limit) {
      parts.push_back(utf8::from_code_points(std::u32string_view(points).substr(begin)));
      break;
    }
    while (position < points.size() && !utf8::is_space(points[position])) ++position;
    parts.push_back(utf8::from_code_points(std::u32string_view(points).substr(begin, position - begin)));
  }
  return parts;
}

std::vector<std::string> rsplit_white_space(std::string_view text, std::int64_t limit) {
  std::u32string reversed = utf8::to_code_points(text);
  std::reverse(reversed.begin(), reversed.end());
  std::vector<std::string> parts = split_white_space(utf8::from_code_points(reversed), limit);
  for (std::string& part : parts) {
    std::u32string points = utf8::to_code_points(part);
    std::reverse(points.begin(), points.end());
    part = utf8::from_code_points(points);
  }
  std::reverse(parts.begin(), parts.end());
  return parts;
}

std::vector<std::string> split(std::string_view text, std::string_view separator, std::int64_t limit) {
  std::vector<std::string> parts;
  while (limit < 0 || static_cast<std::int64_t>(parts.size()) < limit) {
    const std::size_t place = text.find(separator);
    if (place == std::string_view::npos) break;
    parts.emplace_back(text.substr(0, place));
    text.remove_prefix(place + separator.size());
  }
  parts.emplace_back(text);
  return parts;
}

std::vector<std::string> rsplit(std::string_view text, std::string_view separator, std::int64_t limit) {
  std::vector<std::string> parts;
  while (limit < 0 || static_cast<std::int64_t>(parts.size()) < limit) {
    const std::size_t place = text.rfind(separator);
    if (place == std::string_view::npos) break;
    parts.emplace_back(text.substr(place + separator.size()));
    text = text.substr(0, place);
  }
  parts.emplace_back(text);
  std::reverse(parts.begin(), parts.end());
  return parts;
}

std::vector<std::string> split_lines(std::string_view text, bool keep_ends) {
  std::vector<std::string> lines;
  while (!text.empty()) {
    std::size_t end = 0, next = 0;
    while (end < text.size()) {
      const utf8::Decoded c = utf8::decode(text.substr(end));
      next = end + c.size;
      if (is_line_end(c.code_point)) {
        if (c.code_point == '\r' && next < text.size() && text[next] == '\n') ++next;
        break;
      }
      end = next;
    }
    lines.emplace_back(text.substr(0, keep_ends ? next : end));
    text.remove_prefix(next);
  }
  return lines;
}

std::string replace(std::string_view text, std::string_view old_text, std::string_view new_text,
                    std::int64_t count) {
  std::string out;
  if (old_text.empty()) {
    // Python puts the new text before every character and at the end.
    for (const char32_t c : utf8::to_code_points(text)) {
      if (count != 0) out += new_text;
      if (count > 0) --count;
      utf8::append(out, c);
      check_size(out.size());
    }
    if (count != 0) out += new_text;
    return out;
  }
  while (count != 0) {
    const std::size_t place = text.find(old_text);
    if (place == std::string_view::npos) break;
    out.append(text.substr(0, place)).append(new_text);
    check_size(out.size());
    text.remove_prefix(place + old_text.size());
    if (count > 0) --count;
  }
  return out.append(text);
}

std::int64_t find(std::string_view text, std::string_view part) {
  return code_points_before(text, text.find(part));
}
std::int64_t rfind(std::string_view text, std::string_view part) {
  return code_points_before(text, text.rfind(part));
}

std::int64_t count(std::string_view text, std::string_view part) {
  if (part.empty()) return static_cast<std::int64_t>(utf8::length(text)) + 1;
  std::int64_t found = 0;
  for (std::size_t place = text.find(part); place != std::string_view::npos;
       place = text.find(part, place + part.size()))
    ++found;
  return found;
}

std::string pad_left(std::string_view text, std::int64_t width, std::string_view fill) {
  return repeat(fill, width - static_cast<std::int64_t>(utf8::length(text))) + std::string(text);
}

std::string pad_right(std::string_view text, std::int64_t width, std::string_view fill) {
  return std::string(text) + repeat(fill, width - static_cast<std::int64_t>(utf8::length(text)));
}

std::string center(std::string_view text, std::int64_t width, std::string_view fill) {
  const std::int64_t missing = width - static_cast<std::int64_t>(utf8::length(text));
  if (missing <= 0) return std::string(text);
  // CPython's rule for the odd one.
  const std::int64_t left = missing / 2 + (missing & width & 1);
  return repeat(fill, left) + std::string(text) + repeat(fill, missing - left);
}

bool all_of_class(std::string_view text, CharacterClass character_class) {
  const auto belongs = [&](char32_t c) {
    const auto kind = category(c);
    const bool decimal = kind == UTF8PROC_CATEGORY_ND;
    const bool superscript = c == 0xB2 || c == 0xB3 || c == 0xB9 || (c >= 0x2070 && c <= 0x2089);
    const bool numeric = decimal || kind == UTF8PROC_CATEGORY_NL || kind == UTF8PROC_CATEGORY_NO;
    switch (character_class) {
      case CharacterClass::kAlpha:
        return is_letter(c);
      case CharacterClass::kDecimal:
        return decimal;
      case CharacterClass::kDigit:
        return decimal || superscript;
      case CharacterClass::kNumeric:
        return numeric;
      case CharacterClass::kAlnum:
        return is_letter(c) || numeric;
      case CharacterClass::kSpace:
        return utf8::is_space(c);
      case CharacterClass::kAscii:
        return c < 0x80;
    }
    return false;
  };
  const std::u32string points = utf8::to_code_points(text);
  if (points.empty()) return character_class == CharacterClass::kAscii;
  return std::all_of(points.begin(), points.end(), belongs);
}

bool is_lower(std::string_view text) {
  const std::u32string points = utf8::to_code_points(text);
  return std::any_of(points.begin(), points.end(), is_lower_letter) &&
         std::none_of(points.begin(), points.end(), is_upper_letter);
}

bool is_upper(std::string_view text) {
  const std::u32string points = utf8::to_code_points(text);
  return std::any_of(points.begin(), points.end(), is_upper_letter) &&
         std::none_of(points.begin(), points.end(), is_lower_letter);
}

}  // namespace rlhf::jinja::python

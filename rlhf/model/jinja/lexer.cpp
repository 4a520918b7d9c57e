#include "rlhf/model/jinja/lexer.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>
#include <optional>

#include "rlhf/model/jinja/value.h"
#include "rlhf/model/utf8.h"

namespace rlhf::jinja {
namespace {

using TokenKind = Token::Kind;

// Longer ones first.
constexpr std::array<std::string_view, 25> kOperators{"//", "**", "==", "!=", ">=", "<=", "+", "-", "/",
                                                      "*",  "%",  "~",  "[",  "]",  "(",  ")", "{", "}",
                                                      ">",  "<",  "=",  ".",  ":",  "|",  ","};

std::string normalize_newlines(std::string_view source) {
  std::string out;
  for (std::size_t i = 0; i < source.size(); ++i) {
    if (source[i] == '\r') {
      out += '\n';
      if (i + 1 < source.size() && source[i + 1] == '\n') ++i;
    } else {
      out += source[i];
    }
  }
  if (out.ends_with('\n')) out.pop_back();
  return out;
}

bool is_name_start(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' ||
         static_cast<unsigned char>(c) >= 0x80;
}
bool is_digit(char c) {
  return c >= '0' && c <= '9';
}

class Lexer {
 public:
  explicit Lexer(std::string_view source) : source_(normalize_newlines(source)) {}

  std::vector<Token> run() {
    while (position_ < source_.size()) next_tag();
    add(TokenKind::kEnd, "");
    return std::move(tokens_);
  }

 private:
  [[noreturn]] void error(const std::string& message) const { throw TemplateError(message, line_); }

  std::string_view rest() const { return std::string_view(source_).substr(position_); }
  bool starts_with(std::string_view text) const { return rest().starts_with(text); }

  void advance(std::size_t bytes) {
    const std::string_view passed = rest().substr(0, bytes);
    line_ += static_cast<int>(std::count(passed.begin(), passed.end(), '\n'));
    if (!passed.empty()) line_starting_ = passed.back() == '\n';
    position_ += passed.size();
  }

  Token& add(TokenKind kind, std::string text) {
    Token& token = tokens_.emplace_back();
    token.kind = kind;
    token.text = std::move(text);
    token.line = line_;
    return token;
  }

  std::size_t white_space_at(std::size_t position) const {
    std::size_t end = position;
    while (end < source_.size()) {
      const utf8::Decoded next = utf8::decode(std::string_view(source_).substr(end));
      if (!utf8::is_space(next.code_point)) break;
      end += next.size;
    }
    return end - position;
  }

  static std::string_view strip_right(std::string_view text) {
    while (!text.empty()) {
      std::size_t start = text.size() - 1;
      while (start > 0 && (static_cast<unsigned char>(text[start]) & 0xC0) == 0x80) --start;
      if (!utf8::is_space(utf8::decode(text.substr(start)).code_point)) break;
      text = text.substr(0, start);
    }
    return text;
  }

  // lstrip_blocks: white space between the start of a line and a block or comment goes away.
  std::string_view strip_line_start(std::string_view text) const {
    const std::size_t newline = text.rfind('\n');
    const std::size_t line_begin = newline == std::string_view::npos ? 0 : newline + 1;
    if (line_begin == 0 && !line_starting_) return text;
    return strip_right(text.substr(line_begin)).empty() ? text.substr(0, line_begin) : text;
  }

  std::string_view strip_before(std::string_view text, char sign, bool variable) const {
    if (sign == '-') return strip_right(text);
    return sign == '+' || variable ? text : strip_line_start(text);
  }

  void add_data(std::string_view text) {
    if (!text.empty()) add(TokenKind::kData, std::string(text));
  }

  std::size_t find_tag() const {
    for (std::size_t place = source_.find('{', position_); place != std::string::npos;
         place = source_.find('{', place + 1)) {
      const char next = place + 1 < source_.size() ? source_[place + 1] : '\0';
      if (next == '{' || next == '%' || next == '#') return place;
    }
    return std::string::npos;
  }

  void next_tag() {
    const std::size_t place = find_tag();
    if (place == std::string::npos) {
      add_data(rest());
      advance(rest().size());
      return;
    }
    const char kind = source_[place + 1];
    const char after = place + 2 < source_.size() ? source_[place + 2] : '\0';
    const char sign = after == '-' || after == '+' ? after : '\0';
    const std::string_view text = std::string_view(source_).substr(position_, place - position_);
    add_data(strip_before(text, sign, kind == '{'));
    advance(text.size() + (sign ? 3 : 2));
    if (kind == '#') return skip_comment();
    if (kind == '%' && skip_raw_begin()) return add_raw();
    add(kind == '{' ? TokenKind::kVariableBegin : TokenKind::kBlockBegin, "");
    lex_inside(kind == '{' ? "}}" : "%}");
  }

  // What ends a block or comment: "-%}" eats the white space after it, "%}" one newline (trim_blocks), "+%}"
  // nothing.
  std::optional<std::size_t> match_end(std::size_t position, std::string_view closer) const {
    const std::string_view here = std::string_view(source_).substr(position);
    const bool variable = closer == "}}";
    if (here.starts_with('-') && here.substr(1).starts_with(closer)) return 3 + white_space_at(position + 3);
    if (!variable && here.starts_with('+') && here.substr(1).starts_with(closer)) return 3;
    if (!here.starts_with(closer)) return std::nullopt;
    return 2 + (!variable && here.size() > 2 && here[2] == '\n' ? 1 : 0);
  }

  void skip_comment() {
    for (std::size_t place = position_; place < source_.size(); ++place) {
      if (const auto size = match_end(place, "#}")) return advance(place - position_ + *size);
    }
    error("Missing end of comment tag");
  }

  // {% raw %}: returns whether it was there. Its end does not trim a newline.
  bool skip_raw_begin() {
    std::size_t place = position_ + white_space_at(position_);
    if (std::string_view(source_).substr(place, 3) != "raw") return false;
    place += 3;
    place += white_space_at(place);
    const std::string_view here = std::string_view(source_).substr(place);
    if (here.starts_with("%}")) {
      advance(place + 2 - position_);
    } else if (here.starts_with("-%}")) {
      place += 3;
      advance(place + white_space_at(place) - position_);
    } else {
      return false;
    }
    return true;
  }

  void add_raw() {
    for (std::size_t place = source_.find("{%", position_); place != std::string::npos;
         place = source_.find("{%", place + 1)) {
      std::size_t end = place + 2;
      const char sign =
          end < source_.size() && (source_[end] == '-' || source_[end] == '+') ? source_[end] : '\0';
      if (sign) ++end;
      end += white_space_at(end);
      if (std::string_view(source_).substr(end, 6) != "endraw") continue;
      end += 6;
      end += white_space_at(end);
      const auto closing = match_end(end, "%}");
      if (!closing) continue;
      add_data(strip_before(std::string_view(source_).substr(position_, place - position_), sign, false));
      return advance(end + *closing - position_);
    }
    error("Missing end of raw directive");
  }

  void lex_inside(std::string_view closer) {
    std::string open;
    for (;;) {
      if (open.empty()) {
        if (const auto size = match_end(position_, closer)) {
          add(closer == "}}" ? TokenKind::kVariableEnd : TokenKind::kBlockEnd, "");
          return advance(*size);
        }
      }
      if (position_ >= source_.size()) error(concat("unexpected end of template, expected '", closer, "'"));
      if (const std::size_t space = white_space_at(position_)) {
        advance(space);
        continue;
      }
      lex_token(open);
    }
  }

  void lex_token(std::string& open) {
    const char c = source_[position_];
    if (is_digit(c)) return lex_number();
    if (is_name_start(c)) return lex_name();
    if (c == '\'' || c == '"') return lex_string(c);
    const auto* found = std::find_if(kOperators.begin(), kOperators.end(),
                                     [&](std::string_view op) { return starts_with(op); });
    if (found == kOperators.end()) error(concat("unexpected char '", c, "'"));
    balance(*found, open);
    add(TokenKind::kOperator, std::string(*found));
    advance(found->size());
  }

  void balance(std::string_view op, std::string& open) const {
    if (op == "(" || op == "[" || op == "{") {
      open += op == "(" ? ')' : op == "[" ? ']' : '}';
    } else if (op == ")" || op == "]" || op == "}") {
      if (open.empty()) error(concat("unexpected '", op, "'"));
      if (open.back() != op[0]) error(concat("unexpected '", op, "', expected '", open.back(), "'"));
      open.pop_back();
    }
  }

  void lex_name() {
    std::size_t size = 0;
    while (size < rest().size() && (is_name_start(rest()[size]) || is_digit(rest()[size]))) ++size;
    add(TokenKind::kName, std::string(rest().substr(0, size)));
    advance(size);
  }

  std::size_t digits_at(std::size_t offset) const {
    std::size_t size = 0;
    while (offset + size < rest().size() &&
           (is_digit(rest()[offset + size]) || (size > 0 && rest()[offset + size] == '_')))
      ++size;
    return size;
  }

  void lex_number() {
    if (rest().size() > 2 && rest()[0] == '0' &&
        std::string_view("xXoObB").find(rest()[1]) != std::string_view::npos)
      return lex_based();
    std::size_t size = digits_at(0);
    bool is_float = false;
    if (size < rest().size() && rest()[size] == '.' && digits_at(size + 1) > 0) {
      is_float = true;
      size += 1 + digits_at(size + 1);
    }
    if (size < rest().size() && (rest()[size] == 'e' || rest()[size] == 'E')) {
      const std::size_t sign =
          size + 1 < rest().size() && (rest()[size + 1] == '+' || rest()[size + 1] == '-') ? 1 : 0;
      if (digits_at(size + 1 + sign) > 0) {
        is_float = true;
        size += 1 + sign + digits_at(size + 1 + sign);
      }
    }
    std::string text(rest().substr(0, size));
    std::erase(text, '_');
    Token& token = add(is_float ? TokenKind::kFloat : TokenKind::kInteger, text);
    const char* end = text.data() + text.size();
    const auto result = is_float ? std::from_chars(text.data(), end, token.number)
                                 : std::from_chars(text.data(), end, token.integer);
    if (result.ec != std::errc()) error(concat("number ", text, " is out of range"));
    advance(size);
  }

  void lex_based() {
    const char letter = rest()[1];
    const int base = letter == 'x' || letter == 'X' ? 16 : letter == 'o' || letter == 'O' ? 8 : 2;
    std::size_t size = 2;
    while (size < rest().size() &&
           (std::isxdigit(static_cast<unsigned char>(rest()[size])) || rest()[size] == '_'))
      ++size;
    std::string digits(rest().substr(2, size - 2));
    std::erase(digits, '_');
    Token& token = add(TokenKind::kInteger, digits);
    const auto result = std::from_chars(digits.data(), digits.data() + digits.size(), token.integer, base);
    if (result.ec != std::errc() || result.ptr != digits.data() + digits.size())
      error(concat("bad number ", rest().substr(0, size)));
    advance(size);
  }

  void lex_string(char quote) {
    std::size_t end = 1;
    while (end < rest().size() && rest()[end] != quote) end += rest()[end] == '\\' ? 2 : 1;
    if (end >= rest().size()) error(concat("unexpected char ", quote, " (a string without an end)"));
    add(TokenKind::kString, unescape(rest().substr(1, end - 1)));
    advance(end + 1);
  }

  // Python's escapes; unknown ones keep their backslash.
  std::string unescape(std::string_view text) const {
    constexpr std::string_view kLetters = "\\'\"abfnrtv", kValues = "\\'\"\a\b\f\n\r\t\v";
    std::string out;
    while (!text.empty()) {
      if (text[0] != '\\' || text.size() == 1) {
        out += text[0];
        text.remove_prefix(1);
        continue;
      }
      const char letter = text[1];
      text.remove_prefix(2);
      const std::size_t simple = kLetters.find(letter);
      if (simple != std::string_view::npos) {
        out += kValues[simple];
      } else if (letter == 'x' || letter == 'u' || letter == 'U') {
        append_code(out, text, letter == 'x' ? 2 : letter == 'u' ? 4 : 8, 16);
      } else if (letter >= '0' && letter <= '7') {
        std::size_t size = 1;
        while (size < 3 && size - 1 < text.size() && text[size - 1] >= '0' && text[size - 1] <= '7') ++size;
        const std::string digits = letter + std::string(text.substr(0, size - 1));
        text.remove_prefix(size - 1);
        std::string_view view = digits;
        append_code(out, view, size, 8);
      } else if (letter != '\n') {
        out += {'\\', letter};
      }
    }
    return out;
  }

  void append_code(std::string& out, std::string_view& text, std::size_t size, int base) const {
    std::uint32_t code = 0;
    const auto result = std::from_chars(text.data(), text.data() + std::min(size, text.size()), code, base);
    const bool surrogate = code >= 0xD800 && code <= 0xDFFF;
    if (result.ptr != text.data() + size || code > 0x10FFFF || surrogate)
      error("bad character escape in a string");
    utf8::append(out, code);
    text.remove_prefix(size);
  }

  std::string source_;
  std::size_t position_ = 0;
  int line_ = 1;
  bool line_starting_ = true;
  std::vector<Token> tokens_;
};

}  // namespace

std::vector<Token> tokenize(std::string_view source) {
  return Lexer(source).run();
}

}  // namespace rlhf::jinja

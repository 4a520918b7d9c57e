#include "rlhf/data/calculator.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <vector>

#include "rlhf/core/error.h"

namespace rlhf {
namespace {

constexpr std::size_t kMaxBytes = 256;
constexpr int kMaxDepth = 32;
constexpr std::size_t kMaxArguments = 16;

struct SyntaxError {
  std::string message;
};

// Recursive descent; the depth counter bounds the recursion.
class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  double parse() {
    const double value = sum();
    if (!at_end()) stop(concat("unexpected '", peek(), "'"));
    return value;
  }

 private:
  [[noreturn]] void stop(const std::string& message) const {
    throw SyntaxError{concat(message, " at ", position_)};
  }

  void skip_space() {
    while (position_ < text_.size() && text_[position_] == ' ') ++position_;
  }
  bool at_end() {
    skip_space();
    return position_ == text_.size();
  }
  char peek() {
    skip_space();
    return position_ < text_.size() ? text_[position_] : '\0';
  }
  bool accept(char c) {
    if (peek() != c) return false;
    ++position_;
    return true;
  }
  void expect(char c) {
    if (!accept(c)) stop(concat("expected '", c, "'"));
  }

  double sum() {
    double value = product();
    while (true) {
      if (accept('+')) {
        value += product();
      } else if (accept('-')) {
        value -= product();
      } else {
        return value;
      }
    }
  }

  double product() {
    double value = signed_power();
    while (true) {
      if (accept('*')) {
        value *= signed_power();
      } else if (accept('/')) {
        const double divisor = signed_power();
        if (divisor == 0) stop("division by zero");
        value /= divisor;
      } else {
        return value;
      }
    }
  }

  double signed_power() {
    const Depth depth(*this);
    if (accept('-')) return -signed_power();
    if (accept('+')) return signed_power();
    const double base = primary();
    return accept('^') ? std::pow(base, signed_power()) : base;
  }

  double primary() {
    const char c = peek();
    if (accept('(')) {
      const double value = sum();
      expect(')');
      return value;
    }
    if (c >= 'a' && c <= 'z') return function();
    return number();
  }

  double number() {
    const bool starts = (peek() >= '0' && peek() <= '9') || peek() == '.';
    double value = 0;
    const char* begin = text_.data() + position_;
    // Fixed format: the letter e is no part of a number here.
    const auto end = std::from_chars(begin, text_.data() + text_.size(), value, std::chars_format::fixed);
    if (!starts || end.ec != std::errc()) stop("expected a number");
    position_ += static_cast<std::size_t>(end.ptr - begin);
    return value;
  }

  double function() {
    std::string_view name = text_.substr(position_);
    name = name.substr(0, std::min(name.find_first_not_of("abcdefghijklmnopqrstuvwxyz"), name.size()));
    position_ += name.size();
    expect('(');
    std::vector<double> arguments{sum()};
    while (accept(',')) {
      if (arguments.size() == kMaxArguments) stop("too many arguments");
      arguments.push_back(sum());
    }
    expect(')');
    return apply(name, arguments);
  }

  double apply(std::string_view name, const std::vector<double>& arguments) const {
    if (name == "min") return *std::min_element(arguments.begin(), arguments.end());
    if (name == "max") return *std::max_element(arguments.begin(), arguments.end());
    if (name == "round" && arguments.size() <= 2) {
      const double digits = arguments.size() == 2 ? arguments[1] : 0;
      if (digits != std::floor(digits) || std::abs(digits) > 12) stop("round: digits out of range");
      const double scale = std::pow(10.0, digits);
      return std::round(arguments[0] * scale) / scale;
    }
    stop(concat("unknown function ", name));
  }

  struct Depth {
    explicit Depth(Parser& owner) : parser(owner) {
      if (++parser.depth_ > kMaxDepth) parser.stop("nested too deeply");
    }
    ~Depth() { --parser.depth_; }
    Parser& parser;
  };

  std::string_view text_;
  std::size_t position_ = 0;
  int depth_ = 0;
};

}  // namespace

Calculation calculate(std::string_view expression) {
  if (expression.size() > kMaxBytes) return {{}, concat("longer than ", kMaxBytes, " bytes")};
  try {
    const double value = Parser(expression).parse();
    if (!std::isfinite(value)) return {{}, "the result is not finite"};
    return {value, ""};
  } catch (const SyntaxError& error) {
    return {{}, error.message};
  }
}

std::optional<std::string_view> find_calculation(std::string_view text) {
  const std::size_t close = text.rfind(kCalcClose);
  if (close == std::string_view::npos) return {};
  const std::size_t open = text.substr(0, close).rfind(kCalcOpen);
  if (open == std::string_view::npos) return {};
  const std::size_t begin = open + kCalcOpen.size();
  return text.substr(begin, close - begin);
}

std::string to_text(double value) {
  char buffer[64];
  if (value == 0) value = 0;  // -0 is 0
  const auto end = std::to_chars(buffer, buffer + sizeof buffer, value, std::chars_format::general, 10);
  return std::string(buffer, end.ptr);
}

std::string tool_result(const Calculation& calculation) {
  return concat("=", calculation.value ? to_text(*calculation.value) : "error");
}

}  // namespace rlhf

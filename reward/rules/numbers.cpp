#include "reward/rules/numbers.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>
#include <string>

namespace rlhf {
namespace {

bool is_digit(char c) {
  return c >= '0' && c <= '9';
}

char at(std::string_view text, std::size_t i) {
  return i < text.size() ? text[i] : '\0';
}

// A comma belongs to a number only in front of exactly three digits.
bool is_thousands_comma(std::string_view text, std::size_t i) {
  return at(text, i) == ',' && is_digit(at(text, i + 1)) && is_digit(at(text, i + 2)) &&
         is_digit(at(text, i + 3)) && !is_digit(at(text, i + 4));
}

// Reads digits and thousands commas from `i` on into `digits`; returns the position behind them.
std::size_t read_whole_part(std::string_view text, std::size_t i, std::string& digits) {
  while (is_digit(at(text, i)) || (!digits.empty() && is_thousands_comma(text, i))) {
    if (text[i] != ',') digits += text[i];
    ++i;
  }
  return i;
}

bool is_minus_sign(std::string_view text, std::size_t number_begin) {
  if (number_begin == 0 || text[number_begin - 1] != '-') return false;
  if (number_begin == 1) return true;
  const auto before = static_cast<unsigned char>(text[number_begin - 2]);
  return !std::isalnum(before) && before != ')' && before != '%' && before < 0x80;
}

}  // namespace

std::vector<double> find_numbers(std::string_view text) {
  std::vector<double> numbers;
  for (std::size_t i = 0; i < text.size();) {
    const bool starts = is_digit(text[i]) || (text[i] == '.' && is_digit(at(text, i + 1)));
    if (!starts) {
      ++i;
      continue;
    }
    const std::size_t begin = i;
    std::string digits;
    i = read_whole_part(text, i, digits);
    if (at(text, i) == '.' && is_digit(at(text, i + 1))) {
      digits += digits.empty() ? "0." : ".";
      for (++i; is_digit(at(text, i)); ++i) digits += text[i];
    }
    double value = 0;
    const auto end =
        std::from_chars(digits.data(), digits.data() + digits.size(), value, std::chars_format::fixed);
    if (end.ec != std::errc()) continue;
    numbers.push_back(is_minus_sign(text, begin) ? -value : value);
  }
  return numbers;
}

bool is_close(double value, double gold, double relative, double absolute) {
  return std::isfinite(value) && std::abs(value - gold) <= std::max(absolute, relative * std::abs(gold));
}

bool numbers_are_grounded(std::string_view claim, const std::vector<double>& evidence) {
  std::vector<double> allowed = {1, 12, 100, 365};
  for (const double number : evidence) {
    const double x = std::abs(number);
    allowed.insert(allowed.end(), {x, x / 100, 1 + x / 100, std::abs(1 - x / 100)});
  }
  const std::vector<double> claimed = find_numbers(claim);
  return std::all_of(claimed.begin(), claimed.end(), [&](double number) {
    return std::any_of(allowed.begin(), allowed.end(),
                       [&](double known) { return is_close(std::abs(number), known, 1e-9, 1e-12); });
  });
}

bool numbers_are_grounded(std::string_view claim, std::string_view evidence) {
  return numbers_are_grounded(claim, find_numbers(evidence));
}

}  // namespace rlhf

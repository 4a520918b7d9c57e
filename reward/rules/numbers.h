#pragma once

#include <string_view>
#include <vector>

namespace rlhf {

/// Returns the decimal numbers of a text in order: "1,250.50" is one number, "-3" is negative unless the sign
/// follows a digit, a letter or a closing bracket (then it is a minus or a hyphen). Digits that are part of a
/// word ("Q3", "x2") count as numbers.
std::vector<double> find_numbers(std::string_view text);

/// True when |value - gold| <= max(absolute, relative * |gold|). False for values that are not finite.
bool is_close(double value, double gold, double relative, double absolute);

/// Whether every number of `claim` occurs in, or follows from, the numbers of `evidence`: equal up to 1e-9
/// relative, as a percentage (x / 100, 1 + x / 100, 1 - x / 100), or one of the free constants 1, 12, 100,
/// 365. Signs are ignored.
bool numbers_are_grounded(std::string_view claim, std::string_view evidence);
bool numbers_are_grounded(std::string_view claim, const std::vector<double>& evidence);

}  // namespace rlhf

#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace rlhf {

/// The result of evaluating an expression: a finite value, or why there is none.
struct Calculation {
  std::optional<double> value;
  std::string error;  ///< empty with a value
};

/// Evaluates arithmetic on decimal numbers in double precision: + - * / ^ (right-associative, binds tighter
/// than a sign before it), parentheses, min(...), max(...), round(x), round(x, digits). Meant for text that a
/// model wrote: any input is safe. Expressions over 256 bytes or nested deeper than 32 levels, division by
/// zero, and results that are not finite are errors.
Calculation calculate(std::string_view expression);

inline constexpr std::string_view kCalcOpen = "<calc>";
inline constexpr std::string_view kCalcClose = "</calc>";

/// Returns the expression of the last complete `<calc>...</calc>` in a text; nothing when there is none.
std::optional<std::string_view> find_calculation(std::string_view text);

/// Returns a result as text, at most 10 significant digits: "3000", "0.125".
std::string to_text(double value);

/// Returns what the tool writes back into the context behind `</calc>`: "=3000" or "=error".
std::string tool_result(const Calculation& calculation);

}  // namespace rlhf

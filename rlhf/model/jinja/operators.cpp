#include <algorithm>
#include <cmath>

#include "rlhf/model/jinja/interpreter.h"
#include "rlhf/model/jinja/python_text.h"
#include "rlhf/model/utf8.h"

namespace rlhf::jinja {
namespace {

constexpr std::size_t kMaxItems = 10'000'000;

[[noreturn]] void fail_operands(std::string_view op, const Value& a, const Value& b) {
  fail<TemplateError>("unsupported operand type(s) for ", op, ": '", type_name(a), "' and '", type_name(b),
                      "'");
}

// Python's integers have no limits, ours have: an error instead of a wrong number.
std::int64_t checked(bool overflow, const std::int64_t& value) {
  if (overflow) fail<TemplateError>("integer beyond 64 bits");
  return value;
}

std::int64_t floor_divide(std::int64_t a, std::int64_t b) {
  if (b == 0) fail<TemplateError>("integer division or modulo by zero");
  if (b == -1) {
    std::int64_t result = 0;
    return checked(__builtin_sub_overflow(std::int64_t{0}, a, &result), result);
  }
  return a / b - ((a % b != 0) && ((a < 0) != (b < 0)) ? 1 : 0);
}

std::int64_t floor_modulo(std::int64_t a, std::int64_t b) {
  if (b == 0) fail<TemplateError>("integer division or modulo by zero");
  if (b == -1) return 0;
  const std::int64_t rest = a % b;
  return rest != 0 && ((rest < 0) != (b < 0)) ? rest + b : rest;
}

Value integer_power(std::int64_t base, std::int64_t exponent) {
  if (exponent < 0) return std::pow(static_cast<double>(base), static_cast<double>(exponent));
  if (base == 0 || base == 1) return exponent == 0 ? std::int64_t{1} : base;
  if (base == -1) return exponent % 2 == 0 ? std::int64_t{1} : std::int64_t{-1};
  std::int64_t result = 1;
  for (; exponent > 0; --exponent) checked(__builtin_mul_overflow(result, base, &result), result);
  return result;
}

Value integer_operator(std::string_view op, std::int64_t a, std::int64_t b) {
  std::int64_t result = 0;
  if (op == "+") return checked(__builtin_add_overflow(a, b, &result), result);
  if (op == "-") return checked(__builtin_sub_overflow(a, b, &result), result);
  if (op == "*") return checked(__builtin_mul_overflow(a, b, &result), result);
  if (op == "//") return floor_divide(a, b);
  if (op == "%") return floor_modulo(a, b);
  if (op == "**") return integer_power(a, b);
  if (b == 0) fail<TemplateError>("division by zero");
  return static_cast<double>(a) / static_cast<double>(b);
}

Value float_operator(std::string_view op, double a, double b) {
  if (op == "+") return a + b;
  if (op == "-") return a - b;
  if (op == "*") return a * b;
  if (op == "**") return std::pow(a, b);
  if (b == 0) fail<TemplateError>("float division by zero");
  if (op == "/") return a / b;
  if (op == "//") return std::floor(a / b);
  const double rest = std::fmod(a, b);
  return rest != 0 && (rest < 0) != (b < 0) ? rest + b : rest;
}

Value repeat(const Value& value, std::int64_t times) {
  times = std::max<std::int64_t>(times, 0);
  if (value.is_string()) {
    const std::string& text = value.text();
    python::check_size(text.empty() ? 0
                       : static_cast<std::size_t>(times) > python::kMaxTextBytes
                           ? SIZE_MAX
                           : text.size() * static_cast<std::size_t>(times));
    std::string out;
    for (std::int64_t i = 0; i < times && !text.empty(); ++i) out += text;
    return out;
  }
  const Sequence& sequence = *value.as_sequence();
  if (!sequence.items.empty() && static_cast<std::size_t>(times) > kMaxItems / sequence.items.size())
    fail<TemplateError>("a list would be too long");
  std::vector<Value> items;
  for (std::int64_t i = 0; i < times && !sequence.items.empty(); ++i)
    items.insert(items.end(), sequence.items.begin(), sequence.items.end());
  return Value::sequence(sequence.kind, std::move(items));
}

bool repeatable(const Value& value) {
  const Sequence* sequence = value.as_sequence();
  return value.is_string() ||
         (sequence && (sequence->kind == Sequence::Kind::kList || sequence->kind == Sequence::Kind::kTuple));
}

Value add(const Value& a, const Value& b) {
  if (a.is_string() && b.is_string()) {
    python::check_size(a.text().size() + b.text().size());
    return a.text() + b.text();
  }
  const Sequence *left = a.as_sequence(), *right = b.as_sequence();
  if (left && right && left->kind == right->kind && left->kind <= Sequence::Kind::kTuple) {
    if (left->items.size() + right->items.size() > kMaxItems) fail<TemplateError>("a list would be too long");
    std::vector<Value> items = left->items;
    items.insert(items.end(), right->items.begin(), right->items.end());
    return Value::sequence(left->kind, std::move(items));
  }
  if (a.is_string()) fail<TemplateError>("can only concatenate str (not \"", type_name(b), "\") to str");
  fail_operands("+", a, b);
}

}  // namespace

Value apply_operator(std::string_view op, const Value& a, const Value& b) {
  if (op == "%" && a.is_string()) return python::percent_format(a.text(), b);
  for (const Value* value : {&a, &b}) {
    if (const Undefined* undefined = value->get<Undefined>()) fail<TemplateError>(*undefined->message);
  }
  if (a.is_number() && b.is_number()) {
    if (a.is_float() || b.is_float()) return float_operator(op, a.to_float(), b.to_float());
    return integer_operator(op, a.to_int(""), b.to_int(""));
  }
  if (op == "+") return add(a, b);
  if (op == "*" && repeatable(a) && (b.is_int() || b.is_bool())) return repeat(a, b.to_int(""));
  if (op == "*" && repeatable(b) && (a.is_int() || a.is_bool())) return repeat(b, a.to_int(""));
  fail_operands(op, a, b);
}

void fail_undefined(const Value& value) {
  fail<TemplateError>(*value.get<Undefined>()->message);
}

Value negate(const Value& value) {
  if (const Undefined* undefined = value.get<Undefined>()) fail<TemplateError>(*undefined->message);
  if (value.is_float()) return -value.to_float();
  if (!value.is_number()) fail<TemplateError>("bad operand type for unary -: '", type_name(value), "'");
  return integer_operator("-", 0, value.to_int(""));
}

Value slice(const Value& object, const Value& start, const Value& stop, const Value& step_value) {
  const Sequence* sequence = object.as_sequence();
  const bool sliceable = object.is_string() || (sequence && sequence->kind <= Sequence::Kind::kRange);
  if (!sliceable) return Value::undefined(concat("'", type_name(object), " object' cannot be sliced"));
  const std::int64_t step = step_value.is_none() ? 1 : step_value.to_int("slice step");
  if (step == 0 || step == INT64_MIN) fail<TemplateError>("slice step cannot be zero");
  const std::u32string points = object.is_string() ? utf8::to_code_points(object.text()) : std::u32string();
  const auto size = static_cast<std::int64_t>(sequence ? sequence->items.size() : points.size());
  const std::int64_t lowest = step > 0 ? 0 : -1, highest = step > 0 ? size : size - 1;
  const auto bound = [&](const Value& value, std::int64_t missing) {
    if (value.is_none()) return missing;
    const std::int64_t given = value.to_int("slice index");
    return std::clamp(given < 0 ? std::max(given, -size - 1) + size : given, lowest, highest);
  };
  const std::int64_t first = bound(start, step > 0 ? 0 : size - 1), last = bound(stop, step > 0 ? size : -1);
  std::vector<Value> items;
  std::string text;
  for (std::int64_t i = first; step > 0 ? i < last : i > last;) {
    if (sequence) {
      items.push_back(sequence->items[static_cast<std::size_t>(i)]);
    } else {
      utf8::append(text, points[static_cast<std::size_t>(i)]);
    }
    if (step > 0 ? i > size - step : i < -step) break;
    i += step;
  }
  return sequence ? Value::sequence(sequence->kind, std::move(items)) : Value(std::move(text));
}

}  // namespace rlhf::jinja

#include "rlhf/model/jinja/filters.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <utility>

#include "rlhf/model/jinja/python_text.h"
#include "rlhf/model/utf8.h"

namespace rlhf::jinja {
namespace {

Value to_integer(Interpreter&, Arguments& arguments) {
  const BoundArguments bound("int", arguments, {"value", "default", "base"});
  const Value& value = bound.at(0);
  const Value fallback = bound.get(1, std::int64_t{0});
  if (value.is_bool() || value.is_int()) return value.to_int("");
  const auto truncated = [&](double number) -> Value {
    if (!std::isfinite(number) || std::fabs(number) >= 9.2e18) return fallback;
    return static_cast<std::int64_t>(number);
  };
  if (value.is_float()) return truncated(value.to_float());
  if (!value.is_string()) return fallback;
  std::string text = python::strip(value.text(), std::nullopt, python::Side::kBoth);
  std::erase(text, '_');
  if (text.starts_with('+')) text.erase(0, 1);
  const auto base = static_cast<int>(std::clamp<std::int64_t>(bound.integer(2, 10), 2, 36));
  if (base == 16 && (text.starts_with("0x") || text.starts_with("0X"))) text.erase(0, 2);
  const char* end = text.data() + text.size();
  std::int64_t integer = 0;
  const auto parsed = std::from_chars(text.data(), end, integer, base);
  if (parsed.ec == std::errc() && parsed.ptr == end) return integer;
  double number = 0;
  const auto wide = std::from_chars(text.data(), end, number);
  return wide.ec == std::errc() && wide.ptr == end ? truncated(number) : fallback;
}

Value to_floating(Interpreter&, Arguments& arguments) {
  const BoundArguments bound("float", arguments, {"value", "default"});
  const Value& value = bound.at(0);
  if (value.is_number()) return value.to_float();
  if (value.is_string()) {
    std::string text = python::strip(value.text(), std::nullopt, python::Side::kBoth);
    std::erase(text, '_');
    if (text.starts_with('+')) text.erase(0, 1);
    double number = 0;
    const auto parsed = std::from_chars(text.data(), text.data() + text.size(), number);
    if (parsed.ec == std::errc() && parsed.ptr == text.data() + text.size()) return number;
  }
  return bound.get(1, 0.0);
}

Value round_number(Interpreter&, Arguments& arguments) {
  const BoundArguments bound("round", arguments, {"value", "precision", "method"});
  const Value& value = bound.at(0);
  if (value.is_undefined()) fail_undefined(value);
  const std::int64_t precision = bound.integer(1, 0);
  const std::string method = bound.text(2, "common");
  if (method == "common") {
    if (!value.is_float())
      return precision >= 0
                 ? Value(value.to_int("round"))
                 : Value(static_cast<std::int64_t>(python::round_half_even(value.to_float(), precision)));
    return python::round_half_even(value.to_float(), precision);
  }
  if (method != "ceil" && method != "floor") fail<TemplateError>("method must be common, ceil or floor");
  const double unit = std::pow(10.0, static_cast<double>(precision)), scaled = value.to_float() * unit;
  return (method == "ceil" ? std::ceil(scaled) : std::floor(scaled)) / unit;
}

Value absolute(Interpreter&, Arguments& arguments) {
  const Value value = BoundArguments("abs", arguments, {"x"}).at(0);
  if (value.is_undefined()) fail_undefined(value);
  if (value.is_float()) return std::fabs(value.to_float());
  return value.to_int("abs") < 0 ? negate(value) : Value(value.to_int("abs"));
}

Value default_value(Interpreter&, Arguments& arguments) {
  const BoundArguments bound("default", arguments, {"value", "default_value", "boolean"});
  const Value& value = bound.at(0);
  return value.is_undefined() || (bound.flag(2, false) && !truth(value)) ? bound.get(1, std::string())
                                                                         : value;
}

Value attribute(Interpreter& interpreter, Arguments& arguments) {
  const BoundArguments bound("attr", arguments, {"obj", "name"});
  // Only attributes, no items: a dict has none that a template may use but its methods.
  if (bound.at(0).is_dict()) return find_method(bound.at(0), bound.text(1, ""));
  return interpreter.get_attribute(bound.at(0), bound.text(1, ""));
}

Value as_text(Interpreter&, Arguments& arguments) {
  return to_text(BoundArguments("string", arguments, {"object"}).at(0));
}

// pprint sorts the keys of dicts; where it would also break lines, an error is better than another text.
Value with_sorted_keys(const Value& value, int depth) {
  if (depth > 100) fail<TemplateError>("a value is nested deeper than 100 levels");
  if (const Sequence* sequence = value.as_sequence()) {
    std::vector<Value> items;
    for (const Value& item : sequence->items) items.push_back(with_sorted_keys(item, depth + 1));
    return Value::sequence(sequence->kind, std::move(items));
  }
  if (!value.is_dict()) return value;
  auto sorted = std::make_shared<Mapping>();
  for (const auto& [key, item] : value.as_mapping()->entries)
    sorted->entries.emplace_back(key, with_sorted_keys(item, depth + 1));
  std::stable_sort(sorted->entries.begin(), sorted->entries.end(),
                   [](const auto& a, const auto& b) { return less(a.first, b.first); });
  return sorted;
}

Value pretty(Interpreter&, Arguments& arguments) {
  constexpr std::size_t kPrettyWidth = 80;
  std::string text = repr(with_sorted_keys(BoundArguments("pprint", arguments, {"value"}).at(0), 0));
  if (utf8::length(text) >= kPrettyWidth)
    fail<TemplateError>("the filter pprint is supported for values below ", kPrettyWidth, " characters");
  return text;
}

Value random_item(Interpreter&, Arguments&) {
  fail<TemplateError>("the filter random is not supported: rendering is deterministic");
}

constexpr std::array<std::pair<std::string_view, FilterFunction>, 12> kValueFilters{{
    {"abs", absolute},
    {"attr", attribute},
    {"d", default_value},
    {"default", default_value},
    {"float", to_floating},
    {"int", to_integer},
    {"pprint", pretty},
    {"random", random_item},
    {"round", round_number},
    {"safe", as_text},
    {"string", as_text},
    {"tojson", to_json},
}};

}  // namespace

FilterFunction find_filter(std::string_view name) {
  for (const auto& [own, function] : kValueFilters) {
    if (own == name) return function;
  }
  const FilterFunction text = find_text_filter(name);
  return text ? text : find_collection_filter(name);
}

}  // namespace rlhf::jinja

#include <array>
#include <utility>

#include "rlhf/model/jinja/interpreter.h"
#include "rlhf/model/jinja/python_text.h"

namespace rlhf::jinja {
namespace {

const Value& only(Arguments& arguments, std::string_view name) {
  if (arguments.positional.size() != 1 || !arguments.named.empty())
    fail<TemplateError>("test ", name, " takes no argument");
  return arguments.positional[0];
}

std::pair<const Value*, const Value*> both(Arguments& arguments, std::string_view name) {
  if (arguments.positional.size() + arguments.named.size() != 2)
    fail<TemplateError>("test ", name, " takes one argument");
  const Value& second =
      arguments.positional.size() == 2 ? arguments.positional[1] : arguments.named[0].second;
  return {&arguments.positional[0], &second};
}

void require_order(const Value& a, const Value& b) {
  for (const Value* value : {&a, &b}) {
    if (const Undefined* undefined = value->get<Undefined>()) fail<TemplateError>(*undefined->message);
  }
}

bool test_less(Interpreter&, Arguments& arguments) {
  const auto [a, b] = both(arguments, "lt");
  require_order(*a, *b);
  return less(*a, *b);
}
bool test_greater(Interpreter&, Arguments& arguments) {
  const auto [a, b] = both(arguments, "gt");
  require_order(*a, *b);
  return less(*b, *a);
}
bool test_less_equal(Interpreter&, Arguments& arguments) {
  const auto [a, b] = both(arguments, "le");
  require_order(*a, *b);
  return less(*a, *b) || equal(*a, *b);
}
bool test_greater_equal(Interpreter&, Arguments& arguments) {
  const auto [a, b] = both(arguments, "ge");
  require_order(*a, *b);
  return less(*b, *a) || equal(*a, *b);
}
bool test_equal(Interpreter&, Arguments& arguments) {
  const auto [a, b] = both(arguments, "eq");
  return equal(*a, *b);
}
bool test_not_equal(Interpreter&, Arguments& arguments) {
  const auto [a, b] = both(arguments, "ne");
  return !equal(*a, *b);
}
bool test_in(Interpreter&, Arguments& arguments) {
  const auto [a, b] = both(arguments, "in");
  return contains(*b, *a);
}
bool test_divisible(Interpreter&, Arguments& arguments) {
  const auto [a, b] = both(arguments, "divisibleby");
  return equal(apply_operator("%", *a, *b), std::int64_t{0});
}

// Python's `is`: the same object. Small values and equal strings count as the same.
bool test_same(Interpreter&, Arguments& arguments) {
  const auto [a, b] = both(arguments, "sameas");
  if (a->as_sequence() || b->as_sequence()) return a->as_sequence() == b->as_sequence();
  if (a->as_mapping() || b->as_mapping()) return a->as_mapping() == b->as_mapping();
  return type_name(*a) == type_name(*b) && equal(*a, *b);
}

bool is_odd(const Value& value) {
  return !equal(apply_operator("%", value, std::int64_t{2}), std::int64_t{0});
}

bool is_iterable(const Value& value) {
  return value.is_undefined() || value.is_string() || value.as_sequence() || value.is_dict();
}
bool is_sequence(const Value& value) {
  return is_iterable(value) && !value.is_generator();
}

template <bool (*Predicate)(const Value&)>
bool unary(Interpreter&, Arguments& arguments) {
  return Predicate(only(arguments, "without argument"));
}

constexpr std::array<std::pair<std::string_view, TestFunction>, 39> kTests{{
    {"==", test_equal},
    {"eq", test_equal},
    {"equalto", test_equal},
    {"!=", test_not_equal},
    {"ne", test_not_equal},
    {"<", test_less},
    {"lt", test_less},
    {"lessthan", test_less},
    {">", test_greater},
    {"gt", test_greater},
    {"greaterthan", test_greater},
    {"<=", test_less_equal},
    {"le", test_less_equal},
    {">=", test_greater_equal},
    {"ge", test_greater_equal},
    {"in", test_in},
    {"divisibleby", test_divisible},
    {"sameas", test_same},
    {"defined", unary<[](const Value& v) { return !v.is_undefined(); }>},
    {"undefined", unary<[](const Value& v) { return v.is_undefined(); }>},
    {"none", unary<[](const Value& v) { return v.is_none(); }>},
    {"boolean", unary<[](const Value& v) { return v.is_bool(); }>},
    {"true", unary<[](const Value& v) { return v.is_bool() && truth(v); }>},
    {"false", unary<[](const Value& v) { return v.is_bool() && !truth(v); }>},
    {"integer", unary<[](const Value& v) { return v.is_int(); }>},
    {"float", unary<[](const Value& v) { return v.is_float(); }>},
    {"number", unary<[](const Value& v) { return v.is_number(); }>},
    {"string", unary<[](const Value& v) { return v.is_string(); }>},
    {"mapping", unary<[](const Value& v) { return v.is_dict(); }>},
    {"sequence", unary<is_sequence>},
    {"iterable", unary<is_iterable>},
    {"callable", unary<[](const Value& v) {
       return v.as_callable() != nullptr || v.as_object() != nullptr || v.is_undefined();
     }>},
    {"odd", unary<is_odd>},
    {"even", unary<[](const Value& v) { return !is_odd(v); }>},
    {"lower", unary<[](const Value& v) { return python::is_lower(to_text(v)); }>},
    {"upper", unary<[](const Value& v) { return python::is_upper(to_text(v)); }>},
    {"escaped", unary<[](const Value&) { return false; }>},
    {"filter", unary<[](const Value& v) { return find_filter(to_text(v)) != nullptr; }>},
    {"test", unary<[](const Value& v) { return find_test(to_text(v)) != nullptr; }>},
}};

}  // namespace

TestFunction find_test(std::string_view name) {
  for (const auto& [own, function] : kTests) {
    if (own == name) return function;
  }
  return nullptr;
}

}  // namespace rlhf::jinja

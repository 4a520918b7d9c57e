#include <algorithm>

#include "rlhf/model/jinja/interpreter.h"
#include "rlhf/model/jinja/python_text.h"

namespace rlhf::jinja {

using Kind = Expression::Kind;

namespace {

std::string describe_object(const Value& object) {
  if (object.is_none()) return "None";
  return concat("'", type_name(object), " object'");
}

}  // namespace

Value Interpreter::evaluate(const Expression& node, const ScopePtr& scope) {
  const Depth depth(*this);
  step();
  try {
    return evaluate_node(node, scope);
  } catch (const TemplateError& error) {
    // The innermost expression that failed names its line.
    if (error.line() > 0) throw;
    throw TemplateError(error.message(), node.line);
  }
}

Value Interpreter::evaluate_node(const Expression& node, const ScopePtr& scope) {
  const auto child = [&](std::size_t index) { return evaluate(*node.children[index], scope); };
  switch (node.kind) {
    case Kind::kConstant:
      return node.constant;
    case Kind::kName:
      return evaluate_name(node, scope);
    case Kind::kList:
      return Value::list(evaluate_all(node.children, scope));
    case Kind::kTuple:
      return Value::tuple(evaluate_all(node.children, scope));
    case Kind::kDict:
      return evaluate_dict(node, scope);
    case Kind::kAttribute:
      return get_attribute(child(0), node.name);
    case Kind::kItem:
      return evaluate_item(node, scope);
    case Kind::kCall: {
      const Value callee = child(0);
      return call(callee, evaluate_arguments(node.arguments, scope));
    }
    case Kind::kFilter:
      return evaluate_filter(node, scope, nullptr);
    case Kind::kTest: {
      Arguments arguments = evaluate_arguments(node.arguments, scope);
      arguments.positional.insert(arguments.positional.begin(), child(0));
      return apply_test(node.name, std::move(arguments));
    }
    case Kind::kNot:
      return !truth(child(0));
    case Kind::kNegative:
      return negate(child(0));
    case Kind::kPositive:
      return apply_operator("+", std::int64_t{0}, child(0));
    case Kind::kBinary: {
      const Value left = child(0);
      return apply_operator(node.name, left, child(1));
    }
    case Kind::kConcat:
      return evaluate_concat(node, scope);
    case Kind::kAnd: {
      Value left = child(0);
      return truth(left) ? child(1) : left;
    }
    case Kind::kOr: {
      Value left = child(0);
      return truth(left) ? left : child(1);
    }
    case Kind::kCompare:
      return evaluate_compare(node, scope);
    case Kind::kConditional:
      return evaluate_conditional(node, scope);
    case Kind::kSlice:
    case Kind::kNamespaceTarget:
      break;
  }
  fail<InternalError>("jinja: an expression of kind ", static_cast<int>(node.kind), " cannot be evaluated");
}

std::vector<Value> Interpreter::evaluate_all(const std::vector<ExpressionPtr>& nodes, const ScopePtr& scope) {
  std::vector<Value> values;
  values.reserve(nodes.size());
  for (const auto& node : nodes) values.push_back(evaluate(*node, scope));
  return values;
}

Value Interpreter::evaluate_name(const Expression& node, const ScopePtr& scope) {
  const Value* found = scope->find(node.name);
  return found ? *found : Value::undefined(concat("'", node.name, "' is undefined"));
}

Value Interpreter::evaluate_dict(const Expression& node, const ScopePtr& scope) {
  auto mapping = std::make_shared<Mapping>();
  for (std::size_t i = 0; i < node.children.size(); i += 2) {
    Value key = evaluate(*node.children[i], scope);
    mapping->set(std::move(key), evaluate(*node.children[i + 1], scope));
  }
  return mapping;
}

Value Interpreter::evaluate_item(const Expression& node, const ScopePtr& scope) {
  const Value object = evaluate(*node.children[0], scope);
  const Expression& key = *node.children[1];
  if (key.kind != Kind::kSlice) return get_item(object, evaluate(key, scope));
  const auto part = [&](std::size_t index) {
    return key.children[index] ? evaluate(*key.children[index], scope) : Value();
  };
  const Value start = part(0), stop = part(1);
  if (object.is_undefined()) fail_undefined(object);
  return slice(object, start, stop, part(2));
}

Value Interpreter::evaluate_filter(const Expression& node, const ScopePtr& scope, const Value* operand) {
  Value value = node.children[0] ? node.children[0]->kind == Kind::kFilter && operand
                                       ? evaluate_filter(*node.children[0], scope, operand)
                                       : evaluate(*node.children[0], scope)
                                 : *operand;
  Arguments arguments = evaluate_arguments(node.arguments, scope);
  arguments.positional.insert(arguments.positional.begin(), std::move(value));
  return apply_filter(node.name, std::move(arguments));
}

Value Interpreter::evaluate_compare(const Expression& node, const ScopePtr& scope) {
  Value left = evaluate(*node.children[0], scope);
  for (std::size_t i = 0; i < node.operators.size(); ++i) {
    const std::string& op = node.operators[i];
    Value right = evaluate(*node.children[i + 1], scope);
    const bool ordered = op[0] == '<' || op[0] == '>';
    if (ordered && left.is_undefined()) fail_undefined(left);
    if (ordered && right.is_undefined()) fail_undefined(right);
    bool holds = false;
    if (op == "==")
      holds = equal(left, right);
    else if (op == "!=")
      holds = !equal(left, right);
    else if (op == "<")
      holds = less(left, right);
    else if (op == ">")
      holds = less(right, left);
    else if (op == "<=")
      holds = less(left, right) || equal(left, right);
    else if (op == ">=")
      holds = less(right, left) || equal(left, right);
    else if (op == "in")
      holds = contains(right, left);
    else
      holds = !contains(right, left);
    if (!holds) return false;
    left = std::move(right);
  }
  return true;
}

Value Interpreter::evaluate_concat(const Expression& node, const ScopePtr& scope) {
  std::string text;
  for (const auto& child : node.children) {
    text += to_text(evaluate(*child, scope));
    python::check_size(text.size());
  }
  return text;
}

Value Interpreter::evaluate_conditional(const Expression& node, const ScopePtr& scope) {
  if (truth(evaluate(*node.children[0], scope))) return evaluate(*node.children[1], scope);
  if (node.children[2]) return evaluate(*node.children[2], scope);
  return Value::undefined("the inline if-expression evaluated to false and no else section was defined.");
}

Arguments Interpreter::evaluate_arguments(const CallArguments& given, const ScopePtr& scope) {
  Arguments arguments;
  arguments.positional = evaluate_all(given.positional, scope);
  if (given.star) {
    for (Value& value : iterate(evaluate(*given.star, scope)))
      arguments.positional.push_back(std::move(value));
  }
  for (const auto& [name, value] : given.named) arguments.named.emplace_back(name, evaluate(*value, scope));
  if (given.double_star) {
    const Value more = evaluate(*given.double_star, scope);
    if (!more.is_dict()) fail<TemplateError>("argument after ** must be a mapping, not ", type_name(more));
    for (const auto& [key, value] : more.as_mapping()->entries)
      arguments.named.emplace_back(to_text(key), value);
  }
  return arguments;
}

Value Interpreter::call(const Value& callee, Arguments arguments) {
  const Depth depth(*this);
  if (callee.is_undefined()) fail_undefined(callee);
  if (const Callable* callable = callee.as_callable()) return callable->function(*this, arguments);
  if (Object* object = callee.as_object()) return object->call(*this, arguments);
  fail<TemplateError>("'", type_name(callee), "' object is not callable");
}

Value Interpreter::apply_filter(const std::string& name, Arguments arguments) {
  const FilterFunction filter = find_filter(name);
  if (!filter) fail<TemplateError>("No filter named '", name, "'.");
  return filter(*this, arguments);
}

bool Interpreter::apply_test(const std::string& name, Arguments arguments) {
  const TestFunction test = find_test(name);
  if (!test) fail<TemplateError>("No test named '", name, "'.");
  return test(*this, arguments);
}

Value Interpreter::get_attribute(const Value& object, const std::string& name) {
  if (object.is_undefined()) fail_undefined(object);
  if (Object* own = object.as_object()) return own->attribute(name);
  // Python finds methods before keys: d.items is the method even when there is a key "items".
  if (Value method = find_method(object, name); !method.is_undefined()) return method;
  if (const Mapping* mapping = object.as_mapping()) {
    if (const Value* found = mapping->find_text(name)) return *found;
  }
  const Sequence* sequence = object.as_sequence();
  if (sequence && sequence->kind == Sequence::Kind::kGroup) {
    if (name == "grouper") return sequence->items[0];
    if (name == "list") return sequence->items[1];
  }
  return Value::undefined(concat(describe_object(object), " has no attribute '", name, "'"));
}

Value Interpreter::get_item(const Value& object, const Value& key) {
  if (object.is_undefined()) fail_undefined(object);
  if (object.is_dict()) {
    if (const Value* found = object.as_mapping()->find(key)) return *found;
  } else if ((object.as_sequence() && !object.is_generator()) || object.is_string()) {
    if (key.is_int() || key.is_bool()) {
      const Sequence* sequence = object.as_sequence();
      const bool view =
          sequence && sequence->kind >= Sequence::Kind::kKeys && sequence->kind <= Sequence::Kind::kItems;
      const std::int64_t size = length(object), index = key.to_int(""),
                         place = index < 0 ? index + size : index;
      if (view || place < 0 || place >= size)
        return Value::undefined(concat(describe_object(object), " has no element ", index));
      return sequence ? sequence->items[static_cast<std::size_t>(place)]
                      : slice(object, place, place + 1, Value());
    }
  }
  if (key.is_string()) return get_attribute(object, key.text());
  return Value::undefined(concat(describe_object(object), " has no element ", to_text(key)));
}

BoundArguments::BoundArguments(std::string_view function, Arguments& arguments,
                               std::initializer_list<std::string_view> names)
    : function_(function), names_(names.begin(), names.end()), values_(names.size()) {
  if (arguments.positional.size() > values_.size()) {
    fail<TemplateError>(function_, "() takes ", values_.size(), " arguments, got ",
                        arguments.positional.size());
  }
  for (std::size_t i = 0; i < arguments.positional.size(); ++i) values_[i] = &arguments.positional[i];
  for (const auto& [name, value] : arguments.named) {
    const auto found = std::find(names_.begin(), names_.end(), name);
    if (found == names_.end())
      fail<TemplateError>(function_, "() got an unexpected keyword argument '", name, "'");
    values_[static_cast<std::size_t>(found - names_.begin())] = &value;
  }
}

const Value& BoundArguments::at(std::size_t index) const {
  if (!values_[index]) fail<TemplateError>(function_, "() is missing the argument '", names_[index], "'");
  return *values_[index];
}

std::int64_t BoundArguments::integer(std::size_t index, std::int64_t fallback) const {
  return has(index) && !values_[index]->is_none()
             ? values_[index]->to_int(concat(function_, "(", names_[index], ")"))
             : fallback;
}

bool BoundArguments::flag(std::size_t index, bool fallback) const {
  return has(index) ? truth(*values_[index]) : fallback;
}

std::string BoundArguments::text(std::size_t index, std::string fallback) const {
  return has(index) ? to_text(*values_[index]) : std::move(fallback);
}

}  // namespace rlhf::jinja

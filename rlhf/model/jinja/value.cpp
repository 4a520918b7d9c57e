#include "rlhf/model/jinja/value.h"

#include <algorithm>
#include <charconv>
#include <cmath>

#include "rlhf/model/jinja/python_text.h"
#include "rlhf/model/utf8.h"

namespace rlhf::jinja {
namespace {

std::string repr_at(const Value& value, int depth);

std::string join_reprs(const std::vector<Value>& items, int depth) {
  std::string out;
  for (std::size_t i = 0; i < items.size(); ++i) {
    if (i > 0) out += ", ";
    out += repr_at(items[i], depth + 1);
  }
  return out;
}

std::string sequence_repr(const Sequence& sequence, int depth) {
  const std::string items = join_reprs(sequence.items, depth);
  switch (sequence.kind) {
    case Sequence::Kind::kTuple:
    case Sequence::Kind::kGroup:
      return "(" + items + (sequence.items.size() == 1 ? ",)" : ")");
    case Sequence::Kind::kKeys:
      return "dict_keys([" + items + "])";
    case Sequence::Kind::kValues:
      return "dict_values([" + items + "])";
    case Sequence::Kind::kItems:
      return "dict_items([" + items + "])";
    case Sequence::Kind::kGenerator:
      return "<generator object>";
    case Sequence::Kind::kRange: {
      const std::int64_t begin = sequence.items.empty() ? 0 : sequence.items.front().to_int("range");
      return concat("range(", begin, ", ", begin + static_cast<std::int64_t>(sequence.items.size()), ")");
    }
    default:
      return "[" + items + "]";
  }
}

std::string mapping_repr(const Mapping& mapping, int depth) {
  std::string out = mapping.is_namespace ? "<Namespace {" : "{";
  for (std::size_t i = 0; i < mapping.entries.size(); ++i) {
    if (i > 0) out += ", ";
    out +=
        repr_at(mapping.entries[i].first, depth + 1) + ": " + repr_at(mapping.entries[i].second, depth + 1);
  }
  return out + (mapping.is_namespace ? "}>" : "}");
}

std::string repr_at(const Value& value, int depth) {
  if (depth > kMaxNesting) fail<TemplateError>("a value is nested deeper than ", kMaxNesting, " levels");
  if (value.is_undefined()) return "Undefined";
  if (value.is_none()) return "None";
  if (const bool* flag = value.get<bool>()) return *flag ? "True" : "False";
  if (const auto* integer = value.get<std::int64_t>()) return std::to_string(*integer);
  if (const double* number = value.get<double>()) return float_repr(*number);
  if (value.is_string()) return python::quoted(value.text());
  if (const Sequence* sequence = value.as_sequence()) return sequence_repr(*sequence, depth);
  if (const Mapping* mapping = value.as_mapping()) return mapping_repr(*mapping, depth);
  if (const Callable* callable = value.as_callable()) return "<function " + callable->name + ">";
  return "<" + std::string(value.as_object()->type_name()) + ">";
}

bool equal_at(const Value& a, const Value& b, int depth);

bool equal_items(const std::vector<Value>& a, const std::vector<Value>& b, int depth) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [&](const Value& x, const Value& y) { return equal_at(x, y, depth + 1); });
}

bool equal_mappings(const Mapping& a, const Mapping& b, int depth) {
  if (a.entries.size() != b.entries.size() || a.is_namespace || b.is_namespace) return &a == &b;
  return std::all_of(a.entries.begin(), a.entries.end(), [&](const auto& entry) {
    const Value* other = b.find(entry.first);
    return other && equal_at(entry.second, *other, depth + 1);
  });
}

bool is_tuple(Sequence::Kind kind) {
  return kind == Sequence::Kind::kTuple || kind == Sequence::Kind::kGroup;
}

bool equal_numbers(const Value& a, const Value& b) {
  if (!a.is_float() && !b.is_float()) return a.to_int("") == b.to_int("");
  return a.to_float() == b.to_float();
}

bool equal_at(const Value& a, const Value& b, int depth) {
  if (depth > kMaxNesting) fail<TemplateError>("a value is nested deeper than ", kMaxNesting, " levels");
  if (a.is_number() && b.is_number()) return equal_numbers(a, b);
  if (a.is_string() && b.is_string()) return a.text() == b.text();
  if (a.is_none() || b.is_none()) return a.is_none() && b.is_none();
  if (a.is_undefined() || b.is_undefined()) return a.is_undefined() && b.is_undefined();
  const Sequence *left = a.as_sequence(), *right = b.as_sequence();
  if (left && right) {
    if (left == right) return true;
    const bool comparable = (is_tuple(left->kind) && is_tuple(right->kind)) || left->kind == right->kind;
    return comparable && left->kind != Sequence::Kind::kGenerator &&
           equal_items(left->items, right->items, depth);
  }
  if (a.as_mapping() && b.as_mapping()) return equal_mappings(*a.as_mapping(), *b.as_mapping(), depth);
  if (a.as_callable() || b.as_callable()) return a.as_callable() == b.as_callable();
  return a.as_object() != nullptr && a.as_object() == b.as_object();
}

bool less_at(const Value& a, const Value& b, int depth) {
  if (depth > kMaxNesting) fail<TemplateError>("a value is nested deeper than ", kMaxNesting, " levels");
  if (a.is_number() && b.is_number()) {
    if (a.is_float() || b.is_float()) return a.to_float() < b.to_float();
    return a.to_int("") < b.to_int("");
  }
  // Code point order is byte order in UTF-8.
  if (a.is_string() && b.is_string()) return a.text() < b.text();
  const Sequence *left = a.as_sequence(), *right = b.as_sequence();
  const bool lists = left && right && left->kind == right->kind &&
                     (left->kind == Sequence::Kind::kList || is_tuple(left->kind));
  if (!lists)
    fail<TemplateError>("'<' not supported between instances of '", type_name(a), "' and '", type_name(b),
                        "'");
  for (std::size_t i = 0; i < std::min(left->items.size(), right->items.size()); ++i) {
    if (!equal_at(left->items[i], right->items[i], depth + 1))
      return less_at(left->items[i], right->items[i], depth + 1);
  }
  return left->items.size() < right->items.size();
}

Value convert_json(const nlohmann::ordered_json& json, int depth) {
  if (depth > kMaxNesting)
    fail<TemplateError>("the messages or tools are nested deeper than ", kMaxNesting, " levels");
  switch (json.type()) {
    case nlohmann::json::value_t::boolean:
      return json.get<bool>();
    case nlohmann::json::value_t::number_unsigned:
      if (json.get<std::uint64_t>() > static_cast<std::uint64_t>(INT64_MAX))
        return static_cast<double>(json.get<std::uint64_t>());
      return json.get<std::int64_t>();
    case nlohmann::json::value_t::number_integer:
      return json.get<std::int64_t>();
    case nlohmann::json::value_t::number_float:
      return json.get<double>();
    case nlohmann::json::value_t::string:
      return json.get<std::string>();
    case nlohmann::json::value_t::array: {
      std::vector<Value> items;
      items.reserve(json.size());
      for (const auto& item : json) items.push_back(convert_json(item, depth + 1));
      return Value::list(std::move(items));
    }
    case nlohmann::json::value_t::object: {
      auto mapping = std::make_shared<Mapping>();
      mapping->entries.reserve(json.size());
      for (const auto& [key, value] : json.items())
        mapping->entries.emplace_back(Value(key), convert_json(value, depth + 1));
      return mapping;
    }
    default:
      return Value();
  }
}

}  // namespace

const Value* Mapping::find(const Value& key) const {
  if (key.is_string()) return find_text(key.text());
  for (const auto& [own, value] : entries) {
    if (equal(own, key)) return &value;
  }
  return nullptr;
}

const Value* Mapping::find_text(std::string_view key) const {
  for (const auto& [own, value] : entries) {
    if (own.is_string() && own.text() == key) return &value;
  }
  return nullptr;
}

void Mapping::set(Value key, Value value) {
  if (const Value* found = find(key)) {
    const_cast<Value&>(*found) = std::move(value);
  } else {
    entries.emplace_back(std::move(key), std::move(value));
  }
}

Value Value::undefined(std::string message) {
  return Value(Undefined{std::make_shared<const std::string>(std::move(message))});
}

Value Value::sequence(Sequence::Kind kind, std::vector<Value> items) {
  auto sequence = std::make_shared<Sequence>();
  sequence->kind = kind;
  sequence->items = std::move(items);
  return sequence;
}

Value Value::callable(std::string name, Function function) {
  return std::make_shared<const Callable>(Callable{std::move(name), std::move(function)});
}

Value Value::from_json(const nlohmann::ordered_json& json) {
  return convert_json(json, 0);
}

Sequence* Value::as_sequence() const {
  const auto* held = get<std::shared_ptr<Sequence>>();
  return held ? held->get() : nullptr;
}
Mapping* Value::as_mapping() const {
  const auto* held = get<std::shared_ptr<Mapping>>();
  return held ? held->get() : nullptr;
}
const Callable* Value::as_callable() const {
  const auto* held = get<std::shared_ptr<const Callable>>();
  return held ? held->get() : nullptr;
}
Object* Value::as_object() const {
  const auto* held = get<std::shared_ptr<Object>>();
  return held ? held->get() : nullptr;
}

bool Value::is_generator() const {
  const Sequence* sequence = as_sequence();
  return sequence && sequence->kind == Sequence::Kind::kGenerator;
}

bool Value::is_dict() const {
  const Mapping* mapping = as_mapping();
  return mapping && !mapping->is_namespace;
}

std::int64_t Value::to_int(std::string_view what) const {
  if (const bool* flag = get<bool>()) return *flag ? 1 : 0;
  if (const auto* integer = get<std::int64_t>()) return *integer;
  fail<TemplateError>(what, ": expected an integer, got '", type_name(*this), "'");
}

double Value::to_float() const {
  if (const double* number = get<double>()) return *number;
  return static_cast<double>(to_int("number"));
}

std::string_view type_name(const Value& value) {
  if (value.is_undefined()) return "Undefined";
  if (value.is_none()) return "NoneType";
  if (value.is_bool()) return "bool";
  if (value.is_int()) return "int";
  if (value.is_float()) return "float";
  if (value.is_string()) return "str";
  if (const Mapping* mapping = value.as_mapping()) return mapping->is_namespace ? "Namespace" : "dict";
  if (const Sequence* sequence = value.as_sequence()) {
    constexpr std::string_view kNames[] = {"list",        "tuple",      "range",     "dict_keys",
                                           "dict_values", "dict_items", "generator", "_GroupTuple"};
    return kNames[static_cast<std::size_t>(sequence->kind)];
  }
  return value.as_callable() ? "function" : value.as_object()->type_name();
}

bool truth(const Value& value) {
  if (value.is_undefined() || value.is_none()) return false;
  if (value.is_number()) return value.to_float() != 0;
  if (value.is_string()) return !value.text().empty();
  if (const Sequence* sequence = value.as_sequence()) return value.is_generator() || !sequence->items.empty();
  if (value.is_dict()) return !value.as_mapping()->entries.empty();
  return true;
}

std::string to_text(const Value& value) {
  if (value.is_string()) return value.text();
  return value.is_undefined() ? "" : repr_at(value, 0);
}

std::string repr(const Value& value) {
  return repr_at(value, 0);
}
bool equal(const Value& a, const Value& b) {
  return equal_at(a, b, 0);
}
bool less(const Value& a, const Value& b) {
  return less_at(a, b, 0);
}

bool contains(const Value& container, const Value& item) {
  if (container.is_string()) {
    if (!item.is_string()) {
      fail<TemplateError>("'in <string>' requires string as left operand, not ", type_name(item));
    }
    return container.text().find(item.text()) != std::string::npos;
  }
  if (container.is_dict()) {
    if (item.as_mapping() || (item.as_sequence() && item.as_sequence()->kind == Sequence::Kind::kList)) {
      fail<TemplateError>("unhashable type: '", type_name(item), "'");
    }
    return container.as_mapping()->find(item) != nullptr;
  }
  const std::vector<Value> items = iterate(container);
  return std::any_of(items.begin(), items.end(), [&](const Value& own) { return equal(own, item); });
}

std::vector<Value> iterate(const Value& value) {
  std::vector<Value> items;
  if (value.is_undefined()) return items;
  if (Sequence* sequence = value.as_sequence()) {
    if (!value.is_generator()) return sequence->items;
    if (!sequence->consumed) items = std::move(sequence->items);
    sequence->consumed = true;
    sequence->items.clear();
    return items;
  }
  if (value.is_string()) {
    for (std::string_view rest = value.text(); !rest.empty();) {
      const utf8::Decoded next = utf8::decode(rest);
      items.emplace_back(rest.substr(0, next.size));
      rest.remove_prefix(next.size);
    }
    return items;
  }
  if (value.is_dict()) {
    for (const auto& [key, own] : value.as_mapping()->entries) items.push_back(key);
    return items;
  }
  fail<TemplateError>("'", type_name(value), "' object is not iterable");
}

std::int64_t length(const Value& value) {
  if (value.is_undefined()) return 0;
  if (value.is_string()) return static_cast<std::int64_t>(utf8::length(value.text()));
  if (value.is_dict()) return static_cast<std::int64_t>(value.as_mapping()->entries.size());
  const Sequence* sequence = value.as_sequence();
  if (!sequence || value.is_generator())
    fail<TemplateError>("object of type '", type_name(value), "' has no len()");
  return static_cast<std::int64_t>(sequence->items.size());
}

std::string float_repr(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value > 0 ? "inf" : "-inf";
  char buffer[32];
  const auto scientific =
      std::to_chars(buffer, buffer + sizeof(buffer), value, std::chars_format::scientific);
  const std::string text(buffer, scientific.ptr);
  const std::size_t e = text.find('e');
  const int exponent = std::stoi(text.substr(e + 1));
  // Python switches to exponents below 1e-4 and from 1e16 on.
  if (exponent < -4 || exponent >= 16) return text;
  const auto fixed = std::to_chars(buffer, buffer + sizeof(buffer), value, std::chars_format::fixed);
  std::string out(buffer, fixed.ptr);
  if (out.find('.') == std::string::npos) out += ".0";
  return out;
}

}  // namespace rlhf::jinja

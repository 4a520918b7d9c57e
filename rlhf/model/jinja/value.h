#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "rlhf/core/error.h"

/// The Jinja language of chat templates, with the meaning that jinja2's sandbox under Python gives it.
namespace rlhf::jinja {

/// A template that cannot be parsed, or that fails or raises while it renders.
class TemplateError : public Error {
 public:
  /// `line` 0: not known yet.
  explicit TemplateError(const std::string& message, int line = 0)
      : Error(line > 0 ? concat("line ", line, ": ", message) : message), message_(message), line_(line) {}
  /// Without the line: for raise_exception(text) just that text.
  const std::string& message() const { return message_; }
  int line() const { return line_; }

 private:
  std::string message_;
  int line_;
};

class Interpreter;
class Value;

/// Deepest nesting of lists and dicts that is printed, compared or converted.
inline constexpr int kMaxNesting = 100;

/// Arguments of a call: positional first, then named.
struct Arguments {
  std::vector<Value> positional;
  std::vector<std::pair<std::string, Value>> named;
};
using Function = std::function<Value(Interpreter&, Arguments&)>;

struct None {};
/// The result of looking up what does not exist; prints as nothing, most uses of it are errors.
struct Undefined {
  std::shared_ptr<const std::string> message;
};
/// A macro, a built-in function or a bound method.
struct Callable {
  std::string name;
  Function function;
};

/// Python's ordered collections. They differ in how they print and what they allow.
struct Sequence {
  enum class Kind { kList, kTuple, kRange, kKeys, kValues, kItems, kGenerator, kGroup };
  Kind kind = Kind::kList;
  std::vector<Value> items;
  /// A generator can be walked through once.
  bool consumed = false;
};

/// A dict or a namespace, in order of insertion.
struct Mapping {
  std::vector<std::pair<Value, Value>> entries;
  bool is_namespace = false;

  const Value* find(const Value& key) const;
  const Value* find_text(std::string_view key) const;
  void set(Value key, Value value);
};

/// Something with attributes that are computed: loop, cycler, joiner.
class Object {
 public:
  virtual ~Object() = default;
  virtual std::string_view type_name() const = 0;
  /// Undefined when there is no such attribute.
  virtual Value attribute(std::string_view name) = 0;
  virtual Value call(Interpreter& interpreter, Arguments& arguments) = 0;
};

/// A Python value. Copies of collections share their content, as references do in Python.
class Value {
 public:
  using Variant =
      std::variant<Undefined, None, bool, std::int64_t, double, std::shared_ptr<const std::string>,
                   std::shared_ptr<Sequence>, std::shared_ptr<Mapping>, std::shared_ptr<const Callable>,
                   std::shared_ptr<Object>>;

  Value() : data_(None{}) {}
  Value(bool value) : data_(value) {}
  Value(std::int64_t value) : data_(value) {}
  Value(double value) : data_(value) {}
  Value(std::string text) : data_(std::make_shared<const std::string>(std::move(text))) {}
  Value(std::string_view text) : Value(std::string(text)) {}
  Value(const char* text) : Value(std::string(text)) {}
  Value(std::shared_ptr<Sequence> sequence) : data_(std::move(sequence)) {}
  Value(std::shared_ptr<Mapping> mapping) : data_(std::move(mapping)) {}
  Value(std::shared_ptr<const Callable> callable) : data_(std::move(callable)) {}
  Value(std::shared_ptr<Object> object) : data_(std::move(object)) {}

  static Value undefined(std::string message);
  static Value sequence(Sequence::Kind kind, std::vector<Value> items);
  static Value list(std::vector<Value> items) { return sequence(Sequence::Kind::kList, std::move(items)); }
  static Value tuple(std::vector<Value> items) { return sequence(Sequence::Kind::kTuple, std::move(items)); }
  static Value callable(std::string name, Function function);
  /// JSON numbers beyond 64 bits become floats.
  static Value from_json(const nlohmann::ordered_json& json);

  template <typename T>
  const T* get() const {
    return std::get_if<T>(&data_);
  }
  bool is_undefined() const { return get<Undefined>() != nullptr; }
  bool is_none() const { return get<None>() != nullptr; }
  bool is_bool() const { return get<bool>() != nullptr; }
  /// An int, not a bool.
  bool is_int() const { return get<std::int64_t>() != nullptr; }
  bool is_float() const { return get<double>() != nullptr; }
  bool is_number() const { return is_bool() || is_int() || is_float(); }
  bool is_string() const { return get<std::shared_ptr<const std::string>>() != nullptr; }
  const std::string& text() const { return **get<std::shared_ptr<const std::string>>(); }
  /// Null unless the value is of that kind.
  Sequence* as_sequence() const;
  Mapping* as_mapping() const;
  const Callable* as_callable() const;
  Object* as_object() const;
  bool is_generator() const;
  /// A dict, not a namespace.
  bool is_dict() const;

  /// bool or int as int. @throws TemplateError unless it is one.
  std::int64_t to_int(std::string_view what) const;
  /// Any number as float. @throws TemplateError unless it is one.
  double to_float() const;

 private:
  explicit Value(Undefined undefined) : data_(std::move(undefined)) {}
  Variant data_;
};

/// Python's name of the type: "str", "NoneType", ...
std::string_view type_name(const Value& value);
bool truth(const Value& value);
/// str() and repr(). @throws TemplateError when nested deeper than 100 levels.
std::string to_text(const Value& value);
std::string repr(const Value& value);
/// ==
bool equal(const Value& a, const Value& b);
/// <. @throws TemplateError for types that have no order.
bool less(const Value& a, const Value& b);
/// `item in container`
bool contains(const Value& container, const Value& item);
/// The items that a for loop sees; marks generators as consumed. @throws TemplateError when not iterable.
std::vector<Value> iterate(const Value& value);
/// len(). @throws TemplateError
std::int64_t length(const Value& value);

/// repr() of a float: shortest text that reads back to the same number.
std::string float_repr(double value);

}  // namespace rlhf::jinja

#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "rlhf/config/field.h"
#include "rlhf/config/node.h"
#include "rlhf/config/value_codec.h"

namespace rlhf::config {

class Schema;

/// One declared key of an option struct, type-erased. The functions refer to the struct that was visited.
struct Field {
  enum class Shape { kValue, kGroup, kList };

  Shape shape = Shape::kValue;
  std::string name;
  std::string type;
  std::string help;
  Bounds bounds;
  std::vector<std::string> choices;  ///< of a choice, in declaration order
  bool required = false;

  std::function<Expectation(const Node&)> assign;  ///< kValue
  std::function<Node()> read;                      ///< kValue
  std::function<bool()> present;                   ///< kGroup: false for an empty std::optional
  std::function<Schema()> open;                    ///< kGroup: creates the struct of an empty std::optional
  std::function<void()> clear;                     ///< kGroup: empties a std::optional, else nothing
  std::function<std::size_t()> size;               ///< kList
  std::function<void(std::size_t)> resize;         ///< kList: to so many items with default values
  std::function<Schema(std::size_t)> item;         ///< kList
  std::function<Schema()> prototype;  ///< kGroup, kList: a struct with default values, for descriptions
};

/// The visitor that turns `visit_fields` into a list of fields. Holds references into the visited struct.
class Schema {
 public:
  /// Describes `options`, which must outlive the result. Large structs declare it `extern template` in their
  /// header: compiling every field of a run takes 20 seconds.
  template <class T>
  static Schema of(T& options);

  template <class T>
  void field(std::string_view name, T& value, std::string_view help, Bounds bounds = {}) {
    Field& field = append(name, help);
    field.type = Codec<T>::type_name();
    field.bounds = bounds;
    field.assign = [&value, bounds](const Node& node) { return Codec<T>::decode(node, value, bounds); };
    field.read = [&value] { return Codec<T>::encode(value); };
  }

  /// As `field`, for a key that has no sensible default.
  template <class T>
  void required(std::string_view name, T& value, std::string_view help, Bounds bounds = {}) {
    field(name, value, help, bounds);
    fields_.back().required = true;
  }

  template <class E>
  void choice(std::string_view name, E& value,
              std::initializer_list<std::pair<std::string_view, std::type_identity_t<E>>> choices,
              std::string_view help) {
    Field& field = append(name, help);
    field.type = "choice";
    std::vector<std::pair<std::string, E>> table;
    for (const auto& [text, option] : choices) {
      table.emplace_back(text, option);
      field.choices.emplace_back(text);
    }
    field.assign = [&value, table](const Node& node) -> Expectation {
      for (const auto& [text, option] : table) {
        if (node.kind == Node::Kind::kScalar && node.text == text) {
          value = option;
          return {};
        }
      }
      return describe_choices(table);
    };
    field.read = [&value, table] {
      for (const auto& [text, option] : table) {
        if (option == value) return Node::quoted_scalar(text);
      }
      return Node::null();
    };
  }

  template <class T>
  void group(std::string_view name, T& value, std::string_view help) {
    Field& field = append(name, help);
    field.shape = Field::Shape::kGroup;
    field.type = "group";
    field.present = [] { return true; };
    field.open = [&value] { return Schema::of(value); };
    field.clear = [] {};
    field.prototype = [] { return Schema::of_default<T>(); };
  }

  template <class T>
  void group(std::string_view name, std::optional<T>& value, std::string_view help) {
    Field& field = append(name, help);
    field.shape = Field::Shape::kGroup;
    field.type = "group or null";
    field.present = [&value] { return value.has_value(); };
    field.open = [&value] {
      if (!value) value.emplace();
      return Schema::of(*value);
    };
    field.clear = [&value] { value.reset(); };
    field.prototype = [] { return Schema::of_default<T>(); };
  }

  template <class T>
  void list(std::string_view name, std::vector<T>& value, std::string_view help) {
    Field& field = append(name, help);
    field.shape = Field::Shape::kList;
    field.type = "list of groups";
    field.size = [&value] { return value.size(); };
    field.resize = [&value](std::size_t size) {
      value.clear();
      value.resize(size);
    };
    field.item = [&value](std::size_t i) { return Schema::of(value.at(i)); };
    field.prototype = [] { return Schema::of_default<T>(); };
  }

  const std::vector<Field>& fields() const { return fields_; }
  const Field* find(std::string_view name) const;
  /// Runs the struct's own validate, if it has one.
  void validate(Problems& problems) const {
    if (validate_) validate_(problems);
  }

 private:
  template <class T>
  static Schema of_default() {
    auto options = std::make_shared<T>();
    Schema schema = of(*options);
    schema.owner_ = options;
    return schema;
  }

  template <class Table>
  static std::string describe_choices(const Table& table) {
    std::string text = "one of";
    for (const auto& entry : table) text += (&entry == &table.front() ? " " : ", ") + entry.first;
    return text;
  }

  Field& append(std::string_view name, std::string_view help);

  std::vector<Field> fields_;
  std::function<void(Problems&)> validate_;
  std::shared_ptr<void> owner_;
};

template <class T>
Schema Schema::of(T& options) {
  Schema schema;
  options.visit_fields(schema);
  if constexpr (requires(const T& t, Problems& p) { t.validate(p); }) {
    schema.validate_ = [&options](Problems& problems) { std::as_const(options).validate(problems); };
  }
  return schema;
}

}  // namespace rlhf::config

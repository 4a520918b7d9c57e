#include "rlhf/config/reader.h"

#include <algorithm>
#include <charconv>
#include <string_view>
#include <utility>

#include "rlhf/config/description.h"
#include "rlhf/config/nearest.h"
#include "rlhf/config/presets.h"
#include "rlhf/core/atomic_file.h"
#include "rlhf/core/error.h"

namespace rlhf::config {
namespace {

constexpr std::size_t kMaxConfigBytes = 1 << 20;
constexpr std::size_t kMaxPresetDepth = 8;
constexpr std::size_t kLongestKey = 200;  // longer keys are not compared with others
constexpr std::string_view kPresetKey = "preset";

std::string join(const std::string& prefix, const std::string& key) {
  return prefix.empty() || key.empty() ? prefix + key : prefix + "." + key;
}

std::string join_all(const std::vector<std::string>& lines) {
  std::string text;
  for (const std::string& line : lines) text += (text.empty() ? "" : "\n") + line;
  return text;
}

void set_location(Node& node, const Location& where) {
  node.where = where;
  for (Node::Key& key : node.keys) key.where = where;
  for (Node& item : node.items) set_location(item, where);
}

std::vector<std::string> split_path(const std::string& path) {
  std::vector<std::string> parts(1);
  for (const char c : path) {
    if (c == '.') {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

// Walks a document along the fields of a schema, sets values and notes problems.
class Assigner {
 public:
  Assigner(const LoadOptions& options, std::string name) : options_(options), name_(std::move(name)) {}

  void apply_overrides(Node& document) {
    for (const std::string& text : options_.overrides) apply_override(document, text);
  }

  void assign_root(const Schema& schema, const Node& document) {
    root_ = &schema;
    if (document.kind != Node::Kind::kNull) assign_group(schema, document, "");
    check_required(schema, "");
    validate(schema, "");
  }

  void throw_problems() const {
    if (!problems_.empty()) throw ConfigError(join_all(problems_));
  }

  const Origins& origins() const { return given_; }

 private:
  void add(const Location& where, const std::string& key, const std::string& message) {
    problems_.push_back(concat(to_string(where), ": ", key.empty() ? "" : key + ": ", message));
  }

  void apply_override(Node& document, const std::string& text) {
    const Location where{"--set", 0, 0};
    const std::size_t equals = text.find('=');
    const std::string path = text.substr(0, equals);
    const std::vector<std::string> parts = split_path(path);
    const bool empty_part = std::find(parts.begin(), parts.end(), "") != parts.end();
    if (equals == std::string::npos || empty_part) {
      return add(where, "", "got " + describe(Node::scalar(text)) + ", expected key.path=value");
    }
    try {
      Node value = parse_yaml(text.substr(equals + 1), "--set " + path);
      set_location(value, where);
      if (Node* target = reach(document, parts, where)) *target = std::move(value);
    } catch (const ConfigError& error) {
      problems_.push_back(error.what());
    }
  }

  // Returns the node at a path, creating groups on the way; nothing (and a problem) where the path does not
  // fit.
  Node* reach(Node& document, const std::vector<std::string>& parts, const Location& where) {
    Node* node = &document;
    std::string path;
    for (const std::string& part : parts) {
      path = join(path, part);
      if (node->kind == Node::Kind::kSequence) {
        std::size_t index = 0;
        const auto end = std::from_chars(part.data(), part.data() + part.size(), index);
        const bool number = end.ec == std::errc() && end.ptr == part.data() + part.size();
        if (!number || index >= node->items.size()) {
          add(where, path, concat("got item ", part, ", expected an index below ", node->items.size()));
          return nullptr;
        }
        node = &node->items[index];
        continue;
      }
      if (node->kind != Node::Kind::kMapping) {
        *node = Node::mapping();
        node->where = where;
      }
      if (Node* existing = node->find(part)) {
        node = existing;
      } else {
        Node created;
        created.where = where;
        node->add(part, std::move(created));
        node = &node->items.back();
      }
    }
    return node;
  }

  void assign_group(const Schema& schema, const Node& node, const std::string& path) {
    if (node.kind != Node::Kind::kMapping) {
      return add(node.where, path, "got " + describe(node) + ", expected a group of keys");
    }
    // A preset lies below the explicit keys, whatever its position among them.
    for (std::size_t i = 0; i < node.keys.size(); ++i) {
      if (node.keys[i].name == kPresetKey) assign_preset(schema, node.items[i], path);
    }
    for (std::size_t i = 0; i < node.keys.size(); ++i) {
      if (node.keys[i].name == kPresetKey) continue;
      assign_key(schema, node.keys[i], node.items[i], path);
    }
  }

  void assign_key(const Schema& schema, const Node::Key& key, const Node& value, const std::string& path) {
    const std::string full = join(path, key.name);
    const Field* field = schema.find(key.name);
    if (!field) return add(key.where, full, "unknown key" + suggestion(schema, key.name, path));
    given_[full] = key.where;
    switch (field->shape) {
      case Field::Shape::kValue:
        return assign_value(*field, value, full);
      case Field::Shape::kGroup:
        return assign_subgroup(*field, value, full);
      case Field::Shape::kList:
        return assign_list(*field, value, full);
    }
  }

  void assign_value(const Field& field, const Node& value, const std::string& path) {
    const Expectation expected = field.assign(value);
    if (!expected) return;
    std::string message = "got " + describe(value) + ", expected " + *expected;
    if (!field.choices.empty() && value.kind == Node::Kind::kScalar) {
      message += "; nearest is " + nearest(value.text, field.choices);
    }
    add(value.where, path, message);
  }

  void assign_subgroup(const Field& field, const Node& value, const std::string& path) {
    // `group:` with nothing below it keeps the defaults of a plain group and switches an optional one off.
    if (value.kind == Node::Kind::kNull) return field.clear();
    assign_group(field.open(), value, path);
  }

  void assign_list(const Field& field, const Node& value, const std::string& path) {
    if (value.kind != Node::Kind::kSequence) {
      return add(value.where, path, "got " + describe(value) + ", expected a list of groups");
    }
    field.resize(value.items.size());
    for (std::size_t i = 0; i < value.items.size(); ++i) {
      const std::string item_path = join(path, std::to_string(i));
      given_[item_path] = value.items[i].where;
      assign_group(field.item(i), value.items[i], item_path);
    }
  }

  void assign_preset(const Schema& schema, const Node& value, const std::string& path) {
    const std::string key = join(path, std::string(kPresetKey));
    if (preset_depth_ >= kMaxPresetDepth)
      return add(value.where, key, "presets include one another without end");
    ++preset_depth_;
    try {
      const Node document = read_preset(value);
      if (document.kind != Node::Kind::kNull) assign_group(schema, document, path);
    } catch (const ConfigError& error) {
      add(value.where, key, error.what());
    }
    --preset_depth_;
  }

  // A built-in preset by its name, or a file relative to the one that names it.
  static Node read_preset(const Node& value) {
    if (value.kind != Node::Kind::kScalar || value.text.empty())
      fail<ConfigError>("got ", describe(value), ", expected the name of a preset or a YAML file");
    if (value.text.ends_with(".yaml") || value.text.ends_with(".yml")) {
      const auto file = std::filesystem::path(value.where.source).parent_path() / value.text;
      return parse_yaml(read_config_file(file), file.string());
    }
    const Preset* preset = find_preset(value.text);
    if (!preset)
      fail<ConfigError>("unknown preset ", value.text, "; nearest preset is ",
                        nearest(value.text, preset_names()));
    return parse_yaml(preset->yaml, preset->path());
  }

  // The nearest key of this group; a key of another group only when its name is closer by more than one edit:
  // a letter too few is likelier than the wrong group.
  std::string suggestion(const Schema& schema, const std::string& key, const std::string& path) const {
    std::vector<std::string> names;
    for (const Field& field : schema.fields()) names.push_back(field.name);
    std::string best = nearest(key, names);
    std::size_t best_distance =
        names.empty() ? std::string::npos : edit_distance(key.substr(0, kLongestKey), best);
    best = join(path, best);
    bool elsewhere = false;
    for (const FieldInfo& info : list_fields(*root_)) {
      const std::string name = info.path.substr(info.path.rfind('.') + 1);
      const std::size_t distance = edit_distance(key.substr(0, kLongestKey), name);
      if (distance + (elsewhere ? 0 : 1) >= best_distance) continue;
      best_distance = distance;
      best = info.path;
      elsewhere = true;
    }
    return "; nearest key is " + best;
  }

  void check_required(const Schema& schema, const std::string& path) {
    for (const Field& field : schema.fields()) {
      const std::string full = join(path, field.name);
      if (field.required && !given_.count(full))
        add(locate(full), full, "missing, expected " + article(field.type));
      if (field.shape == Field::Shape::kGroup && field.present()) check_required(field.open(), full);
      if (field.shape != Field::Shape::kList) continue;
      for (std::size_t i = 0; i < field.size(); ++i)
        check_required(field.item(i), join(full, std::to_string(i)));
    }
  }

  static std::string article(const std::string& type) {
    if (type == "text") return type;
    return (std::string_view("aeiou").find(type[0]) != std::string_view::npos ? "an " : "a ") + type;
  }

  void validate(const Schema& schema, const std::string& path) {
    Problems found;
    schema.validate(found);
    for (const auto& problem : found.all()) {
      const std::string full = join(path, problem.key);
      add(locate(full), full, problem.message);
    }
    for (const Field& field : schema.fields()) {
      const std::string full = join(path, field.name);
      if (field.shape == Field::Shape::kGroup && field.present()) validate(field.open(), full);
      if (field.shape != Field::Shape::kList) continue;
      for (std::size_t i = 0; i < field.size(); ++i) validate(field.item(i), join(full, std::to_string(i)));
    }
  }

  // Where a key, or the nearest group around it that was written at all, stands.
  Location locate(std::string path) const {
    while (!path.empty()) {
      if (const auto found = given_.find(path); found != given_.end()) return found->second;
      const std::size_t dot = path.rfind('.');
      path = dot == std::string::npos ? "" : path.substr(0, dot);
    }
    return {name_, 0, 0};
  }

  const LoadOptions& options_;
  std::string name_;
  const Schema* root_ = nullptr;
  std::size_t preset_depth_ = 0;
  Origins given_;
  std::vector<std::string> problems_;
};

}  // namespace

std::string read_config_file(const std::filesystem::path& path) {
  try {
    return read_text_file(path, kMaxConfigBytes);
  } catch (const IoError& error) {
    fail<ConfigError>(error.what());
  }
}

Origins assign_yaml(const Schema& schema, const std::string& text, const std::string& name,
                    const LoadOptions& options) {
  Node document = parse_yaml(text, name);
  Assigner assigner(options, name);
  assigner.apply_overrides(document);
  assigner.assign_root(schema, document);
  assigner.throw_problems();
  return assigner.origins();
}

}  // namespace rlhf::config

#include "rlhf/config/description.h"

#include <map>

#include "rlhf/config/nearest.h"
#include "rlhf/core/error.h"

namespace rlhf::config {
namespace {

void list_into(const Schema& schema, const std::string& prefix, std::vector<FieldInfo>& out) {
  for (const Field& field : schema.fields()) {
    FieldInfo info{prefix + field.name, field.type,    "", field.bounds, field.choices,
                   field.help,          field.required};
    if (field.shape == Field::Shape::kValue && !field.required) info.default_value = to_yaml(field.read());
    out.push_back(info);
    if (field.shape == Field::Shape::kGroup) {
      list_into(field.present() ? field.open() : field.prototype(), info.path + ".", out);
    } else if (field.shape == Field::Shape::kList) {
      list_into(field.prototype(), info.path + "[].", out);
    }
  }
}

void flatten_into(const Schema& schema, const std::string& prefix,
                  std::vector<std::pair<std::string, std::string>>& out) {
  for (const Field& field : schema.fields()) {
    const std::string path = prefix + field.name;
    if (field.shape == Field::Shape::kValue) {
      out.emplace_back(path, to_yaml(field.read()));
    } else if (field.shape == Field::Shape::kGroup) {
      if (field.present()) {
        flatten_into(field.open(), path + ".", out);
      } else {
        out.emplace_back(path, "null");
      }
    } else {
      for (std::size_t i = 0; i < field.size(); ++i) {
        flatten_into(field.item(i), path + "." + std::to_string(i) + ".", out);
      }
    }
  }
}

// Rewrites `rewards.0.weight` to `rewards[].weight`.
std::string normalise(const std::string& path) {
  std::string out, part;
  const auto flush = [&] {
    const bool index = !part.empty() && part.find_first_not_of("0123456789") == std::string::npos;
    if (index) {
      out += "[]";
    } else {
      out += (out.empty() ? "" : ".") + part;
    }
    part.clear();
  };
  for (const char c : path) {
    if (c == '.') {
      flush();
    } else {
      part += c;
    }
  }
  flush();
  return out;
}

std::string describe(const FieldInfo& info) {
  std::string text = info.path + "\n  " + info.help + "\n  type: " + info.type + describe(info.bounds) + "\n";
  if (info.required) text += "  required\n";
  if (!info.default_value.empty()) text += "  default: " + info.default_value + "\n";
  if (!info.choices.empty()) {
    text += "  choices:";
    for (const std::string& choice : info.choices) text += " " + choice;
    text += "\n";
  }
  return text;
}

}  // namespace

std::vector<FieldInfo> list_fields(const Schema& schema) {
  std::vector<FieldInfo> out;
  list_into(schema, "", out);
  return out;
}

std::string explain(const Schema& schema, const std::string& path) {
  const std::string wanted = normalise(path);
  const std::vector<FieldInfo> all = list_fields(schema);
  std::vector<std::string> paths;
  for (const FieldInfo& info : all) paths.push_back(info.path);
  for (const FieldInfo& info : all) {
    if (info.path != wanted) continue;
    std::string text = describe(info);
    for (const std::string& other : paths) {
      const bool below = other.size() > wanted.size() && other.compare(0, wanted.size(), wanted) == 0 &&
                         (other[wanted.size()] == '.' || other[wanted.size()] == '[');
      if (below) text += "  key: " + other + "\n";
    }
    return text;
  }
  fail<ConfigError>(path, ": unknown key; nearest key is ", nearest(wanted, paths));
}

std::vector<std::pair<std::string, std::string>> flatten(const Schema& schema) {
  std::vector<std::pair<std::string, std::string>> out;
  flatten_into(schema, "", out);
  return out;
}

std::vector<Difference> diff(const Schema& left, const Schema& right) {
  const auto left_values = flatten(left), right_values = flatten(right);
  std::map<std::string, std::string> right_by_path(right_values.begin(), right_values.end());
  std::map<std::string, std::string> left_by_path(left_values.begin(), left_values.end());
  std::vector<Difference> out;
  for (const auto& [path, value] : left_values) {
    const auto other = right_by_path.find(path);
    if (other == right_by_path.end()) {
      out.push_back({path, value, ""});
    } else if (other->second != value) {
      out.push_back({path, value, other->second});
    }
  }
  for (const auto& [path, value] : right_values) {
    if (!left_by_path.count(path)) out.push_back({path, "", value});
  }
  return out;
}

}  // namespace rlhf::config

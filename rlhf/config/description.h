#pragma once

#include <optional>
#include <string>
#include <vector>

#include "rlhf/config/schema.h"

namespace rlhf::config {

/// One key as `rlhf config` shows it.
struct FieldInfo {
  std::string path;  ///< full key path; items of a list are `rewards[].weight`
  std::string type;
  std::string default_value;  ///< in YAML; empty for groups and lists of groups
  Bounds bounds;
  std::vector<std::string> choices;
  std::string help;
  bool required = false;
};

/// One key in which two configurations differ; a side is empty where the key does not exist.
struct Difference {
  std::string path;
  std::string left;
  std::string right;
};

/// Lists all keys below a schema, groups included, in declaration order.
std::vector<FieldInfo> list_fields(const Schema& schema);
/// Describes one key in a few lines: type, default, bounds or choices, help; for a group, the keys in it.
/// List indices may be written `rewards.0.weight` or `rewards[].weight`.
/// @throws ConfigError naming the nearest key.
std::string explain(const Schema& schema, const std::string& path);
/// Returns every value as (path, YAML text), in declaration order.
std::vector<std::pair<std::string, std::string>> flatten(const Schema& schema);
std::vector<Difference> diff(const Schema& left, const Schema& right);

template <class T>
std::vector<FieldInfo> list_fields() {
  T options;
  return list_fields(Schema::of(options));
}

template <class T>
std::string explain(const std::string& path) {
  T options;
  return explain(Schema::of(options), path);
}

/// Returns the keys in which two option structs differ, in declaration order.
template <class T>
std::vector<Difference> diff(T left, T right) {
  return diff(Schema::of(left), Schema::of(right));
}

}  // namespace rlhf::config

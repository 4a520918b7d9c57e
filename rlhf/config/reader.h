#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "rlhf/config/schema.h"

namespace rlhf::config {

/// What lies beside a configuration file when it is read.
struct LoadOptions {
  /// `key.path=value` each, value in YAML. They replace or add keys of the document; list items are
  /// `rewards.0.weight`.
  std::vector<std::string> overrides;
  /// Folders searched in this order for `NAME.yaml` of a `preset: NAME` key.
  std::vector<std::filesystem::path> preset_folders;
};

/// Assigns a document to the fields of a schema. All problems are collected before anything is thrown.
/// `name` is shown in locations. @throws ConfigError with one problem a line,
/// `file:line:column: full.key.path: got X, expected Y` or `...: unknown key; nearest key is Z`.
void assign_yaml(const Schema& schema, const std::string& text, const std::string& name,
                 const LoadOptions& options);

/// Reads options of type `T` from YAML text. Keys that are absent keep the defaults of `T`.
/// @throws ConfigError as assign_yaml.
template <class T>
T parse(const std::string& text, const std::string& name, const LoadOptions& options = {}) {
  T value;
  assign_yaml(Schema::of(value), text, name, options);
  return value;
}

/// Returns the text of a configuration file of at most 1 MiB. @throws ConfigError when it cannot be read.
std::string read_config_file(const std::filesystem::path& path);

/// Reads options of type `T` from a file. @throws ConfigError as assign_yaml.
template <class T>
T load(const std::filesystem::path& path, const LoadOptions& options = {}) {
  return parse<T>(read_config_file(path), path.string(), options);
}

}  // namespace rlhf::config

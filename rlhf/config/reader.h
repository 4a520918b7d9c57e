#pragma once

#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "rlhf/config/node.h"
#include "rlhf/config/schema.h"

namespace rlhf::config {

/// What lies beside a configuration file when it is read.
struct LoadOptions {
  /// `key.path=value` each, value in YAML. They replace or add keys of the document; list items are
  /// `rewards.0.weight`.
  std::vector<std::string> overrides;
};

/// Where each key was written, by full path: the run file, a preset or `--set`. Keys with default values are
/// absent.
using Origins = std::map<std::string, Location>;

/// Assigns a document to the fields of a schema. All problems are collected before anything is thrown.
/// `name` is shown in locations. `preset: NAME` in a group takes the values of a built-in preset (presets.h),
/// `preset: FILE.yaml` those of a file, relative to the one that names it; both lie below the explicit keys.
/// @throws ConfigError with one problem a line, `file:line:column: full.key.path: got X, expected Y` or `...:
/// unknown key; nearest key is Z`.
Origins assign_yaml(const Schema& schema, const std::string& text, const std::string& name,
                    const LoadOptions& options);

/// Reads options of type `T` from YAML text. Keys that are absent keep the defaults of `T`.
/// @throws ConfigError as assign_yaml.
template <class T>
T parse(const std::string& text, const std::string& name, const LoadOptions& options = {}) {
  T value;
  assign_yaml(Schema::of(value), text, name, options);
  return value;
}

/// Returns the options of a built-in preset: its keys over the defaults of `T`. @throws ConfigError naming
/// the nearest preset when there is none of that name.
template <class T>
T load_preset(const std::string& name) {
  return parse<T>("preset: " + name, name);
}

/// Options and where their keys were written.
template <class T>
struct Traced {
  T value;
  Origins origins;
};

/// As parse, and says where each key was written.
template <class T>
Traced<T> parse_traced(const std::string& text, const std::string& name, const LoadOptions& options = {}) {
  Traced<T> traced;
  traced.origins = assign_yaml(Schema::of(traced.value), text, name, options);
  return traced;
}

/// Returns the text of a configuration file of at most 1 MiB. @throws ConfigError when it cannot be read.
std::string read_config_file(const std::filesystem::path& path);

/// Reads options of type `T` from a file. @throws ConfigError as assign_yaml.
template <class T>
T load(const std::filesystem::path& path, const LoadOptions& options = {}) {
  return parse<T>(read_config_file(path), path.string(), options);
}

}  // namespace rlhf::config

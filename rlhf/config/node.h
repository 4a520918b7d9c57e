#pragma once

#include <string>
#include <vector>

namespace rlhf::config {

/// Where a value was written: a file position, or a command-line override.
struct Location {
  std::string source;  ///< file name, or "--set"
  int line = 0;        ///< from 1; 0 when there is none
  int column = 0;      ///< from 1
};
/// Returns `file:line:column`, or the source alone when there is no line.
std::string to_string(const Location& location);

/// One value of a configuration document, before it is known what type it should have.
struct Node {
  enum class Kind { kNull, kScalar, kSequence, kMapping };
  struct Key {
    std::string name;
    Location where;
  };

  Kind kind = Kind::kNull;
  std::string text;         ///< of a scalar
  bool quoted = false;      ///< a quoted scalar is text, never a number or null
  std::vector<Node> items;  ///< of a sequence, or the values of a mapping
  std::vector<Key> keys;    ///< of a mapping: keys[i] names items[i]
  Location where;

  static Node null() { return {}; }
  static Node scalar(std::string text);
  static Node quoted_scalar(std::string text);
  static Node sequence();
  static Node mapping();
  void add(std::string key, Node value);
  /// Returns the value of a key of a mapping, or nullptr.
  Node* find(const std::string& key);
};

/// Names what a node holds for an error message: `abc`, `"abc"`, `a list`, `a group`, `nothing`.
std::string describe(const Node& node);

/// Limits that keep a hostile document from costing more than a second.
struct ParseLimits {
  std::size_t max_bytes = 1 << 20;
  std::size_t max_nodes = 100000;  ///< after aliases are expanded
};

/// Parses one YAML document (YAML 1.2 core, through yaml-cpp). `name` is used in locations.
/// @throws ConfigError `name:line:column: ...` for syntax errors, invalid UTF-8, several documents, recursive
/// aliases
///         and documents over the limits.
Node parse_yaml(const std::string& text, const std::string& name, const ParseLimits& limits = {});

/// Writes a value in YAML flow style on one line: `0.2`, `"a b"`, `[1, 2]`, `{a: 1}`.
std::string to_yaml(const Node& node);

}  // namespace rlhf::config

#pragma once

#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "rollout/environment/environment.h"

namespace rlhf {

/// How a tool is announced to the policy.
struct ToolSchema {
  std::string name;         ///< unique among the tools of an environment
  std::string description;  ///< one or two sentences
  /// JSON schema of the arguments: {"type": "object", "properties": {NAME: {"type": ...}}, "required":
  /// [...]}.
  nlohmann::ordered_json parameters = {{"type", "object"}, {"properties", nlohmann::ordered_json::object()}};
};

/// What a call gives: text that the policy reads. An error is an answer like any other.
struct ToolResult {
  std::string text;
  bool is_error = false;

  static ToolResult ok(std::string text) { return {std::move(text), false}; }
  /// The text becomes {"error": message}.
  static ToolResult error(const std::string& message);
};

/// Something the policy can call. Embedders derive from it.
class Tool {
 public:
  virtual ~Tool() = default;
  virtual const ToolSchema& schema() const = 0;
  /// Called with arguments that fit the schema, as far as check_arguments looks; from several threads at
  /// once. Should look at `limit` where it may take long. An exception becomes an error result.
  virtual ToolResult call(const nlohmann::json& arguments, const CallLimit& limit) const = 0;
  /// True: takes microseconds (see EnvironmentFactory::answers_at_once).
  virtual bool answers_at_once() const { return false; }
};

/// Compares arguments with a schema: an object, all required keys, no others (unless the schema allows
/// additionalProperties), and the JSON type of each value ("type" as a name or a list of names).
/// @return what is wrong, naming key, value and what was expected; nothing when they fit
std::optional<std::string> check_arguments(const nlohmann::ordered_json& parameters,
                                           const nlohmann::json& arguments);

/// {"type": "function", "function": {name, description, parameters}}, as chat templates read it.
nlohmann::ordered_json to_json(const ToolSchema& schema);

/// The text as UTF-8 (other bytes become U+FFFD), cut before a character to at most `max_bytes` with a note
/// behind it that says how much is missing.
std::string bounded_text(const std::string& text, std::size_t max_bytes);

}  // namespace rlhf

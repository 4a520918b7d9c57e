#include "rollout/environment/tool.h"

#include <algorithm>

#include "rlhf/core/error.h"

namespace rlhf {
namespace {

using nlohmann::json;

constexpr std::size_t kShownBytes = 80;

std::string shown(const json& value) {
  return bounded_text(value.dump(-1, ' ', false, json::error_handler_t::replace), kShownBytes);
}

bool has_type(const json& value, const std::string& type) {
  if (type == "string") return value.is_string();
  if (type == "number") return value.is_number();
  if (type == "integer") return value.is_number_integer();
  if (type == "boolean") return value.is_boolean();
  if (type == "array") return value.is_array();
  if (type == "object") return value.is_object();
  if (type == "null") return value.is_null();
  return true;  // a type of a later schema draft: the tool itself must look
}

bool has_type(const json& value, const nlohmann::ordered_json& type) {
  if (type.is_string()) return has_type(value, type.get<std::string>());
  if (!type.is_array()) return true;
  return std::ranges::any_of(type, [&](const auto& one) { return has_type(value, one); });
}

std::string names_of(const nlohmann::ordered_json& properties) {
  std::string names;
  for (const auto& [name, property] : properties.items()) names += (names.empty() ? "" : ", ") + name;
  return names.empty() ? "none" : names;
}

}  // namespace

ToolResult ToolResult::error(const std::string& message) {
  return {json{{"error", message}}.dump(-1, ' ', false, json::error_handler_t::replace), true};
}

std::optional<std::string> check_arguments(const nlohmann::ordered_json& parameters, const json& arguments) {
  if (!arguments.is_object()) return concat("arguments: got ", shown(arguments), ", expected an object");
  const auto properties = parameters.value("properties", nlohmann::ordered_json::object());
  for (const auto& name : parameters.value("required", nlohmann::ordered_json::array()))
    if (!arguments.contains(name.get<std::string>()))
      return concat("argument ", name.get<std::string>(), " is missing");
  const auto additional = parameters.find("additionalProperties");
  const bool open = additional != parameters.end() && *additional != false;
  for (const auto& [name, value] : arguments.items()) {
    const auto property = properties.find(name);
    if (property == properties.end()) {
      if (open) continue;
      return concat("there is no argument ", bounded_text(name, kShownBytes),
                    "; expected: ", names_of(properties));
    }
    if (!property->is_object() || !property->contains("type")) continue;
    if (!has_type(value, (*property)["type"]))
      return concat("argument ", name, ": got ", shown(value), ", expected ", (*property)["type"].dump());
  }
  return {};
}

nlohmann::ordered_json to_json(const ToolSchema& schema) {
  return {{"type", "function"},
          {"function",
           {{"name", schema.name}, {"description", schema.description}, {"parameters", schema.parameters}}}};
}

std::string bounded_text(const std::string& text, std::size_t max_bytes) {
  std::size_t end = std::min(text.size(), max_bytes);
  const auto continues = [&] { return (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80; };
  // A character has at most four bytes; what is no UTF-8 is cut anywhere.
  for (int back = 0; end < text.size() && end > 0 && back < 3 && continues(); ++back) --end;
  // The JSON writer replaces ill-formed bytes, the reader gives the text back.
  const std::string written = json(text.substr(0, end)).dump(-1, ' ', false, json::error_handler_t::replace);
  std::string bounded = json::parse(written).get<std::string>();
  if (end < text.size()) bounded += concat(" [", text.size() - end, " more bytes left out]");
  return bounded;
}

}  // namespace rlhf

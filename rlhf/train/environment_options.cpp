#include "rlhf/train/environment_options.h"

#include <nlohmann/json.hpp>

namespace rlhf {

void ToolSection::validate(config::Problems& problems) const {
  const auto belongs = [&](const char* key, bool given, Type owner) {
    if (given && type != owner) problems.add(key, "does not apply to this type of tool");
  };
  belongs("file", !file.empty(), Type::kTableLookup);
  belongs("key", !key.empty(), Type::kTableLookup);
  belongs("argv", !argv.empty(), Type::kSubprocess);
  belongs("parameters", !parameters.empty(), Type::kSubprocess);
  if (type == Type::kTableLookup && file.empty()) problems.add("file", "table_lookup needs a file");
  if (type == Type::kTableLookup && key.empty()) problems.add("key", "table_lookup needs a key column");
  if (type != Type::kSubprocess) return;
  if (argv.empty() || argv.front().empty()) problems.add("argv", "subprocess needs a program");
  if (name.empty()) problems.add("name", "subprocess needs a name");
  if (max_memory.percent) problems.add("max_memory", "expected bytes, such as 512MiB");
  if (parameters.empty()) return;
  const auto schema = nlohmann::json::parse(parameters, nullptr, false);
  const bool fits = schema.is_object() && schema.value("type", nlohmann::json()) == "object" &&
                    schema.value("properties", nlohmann::json::object()).is_object() &&
                    schema.value("required", nlohmann::json::array()).is_array();
  if (!fits)
    problems.add(
        "parameters",
        "expected a JSON schema: {\"type\": \"object\", \"properties\": {...}, \"required\": [...]}");
}

}  // namespace rlhf

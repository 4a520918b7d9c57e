#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace rlhf {

/// A call as the policy wrote it, or what is wrong with it.
struct ToolCallText {
  std::string name;
  nlohmann::json arguments = nlohmann::json::object();
  std::string error;  ///< empty when it could be read
};

/// Reads the calls of a turn: `<tool_call>{"name": NAME, "arguments": {...}}</tool_call>`, the form of the
/// Hermes and Qwen chat templates. Arguments may also be an object written as a JSON string. Meant for text
/// that a model wrote: any input is safe, time is linear in its length. A call that cannot be read (not
/// closed, over 64 KiB, nested deeper than 64 levels, no JSON, no name) comes back with an error.
std::vector<ToolCallText> parse_tool_calls(std::string_view turn);

}  // namespace rlhf

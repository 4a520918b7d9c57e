#include "rollout/environment/tool_call.h"

#include <algorithm>
#include <optional>

#include "rlhf/core/error.h"

namespace rlhf {
namespace {

using nlohmann::json;

constexpr std::string_view kOpen = "<tool_call>", kClose = "</tool_call>";
constexpr std::size_t kMaxCallBytes = std::size_t{64} << 10;
constexpr int kMaxCallDepth = 64;

// Nesting is bounded before anything recursive sees the value. Brackets inside strings do not count.
bool is_too_deep(std::string_view text) {
  int depth = 0, deepest = 0;
  bool in_string = false;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '{' || c == '[') {
      deepest = std::max(deepest, ++depth);
    } else if (c == '}' || c == ']') {
      --depth;
    }
  }
  return deepest > kMaxCallDepth;
}

struct CallReading {
  json value;
  std::string error;
};

CallReading parse_call_json(std::string_view text) {
  if (text.size() > kMaxCallBytes) return {{}, concat("the call is longer than ", kMaxCallBytes, " bytes")};
  if (is_too_deep(text)) return {{}, concat("the call is nested deeper than ", kMaxCallDepth, " levels")};
  try {
    return {json::parse(text), ""};
  } catch (const json::exception& error) {
    return {{}, concat("the call is not JSON: ", error.what())};
  }
}

ToolCallText read_call(std::string_view text) {
  ToolCallText call;
  CallReading reading = parse_call_json(text);
  call.error = reading.error;
  if (!call.error.empty()) return call;
  json& value = reading.value;
  if (!value.is_object() || !value.contains("name") || !value["name"].is_string()) {
    call.error = R"(expected {"name": ..., "arguments": {...}})";
    return call;
  }
  call.name = value["name"].get<std::string>();
  if (!value.contains("arguments")) return call;
  call.arguments = std::move(value["arguments"]);
  if (!call.arguments.is_string()) return call;
  reading = parse_call_json(call.arguments.get<std::string>());
  if (reading.error.empty()) call.arguments = std::move(reading.value);
  return call;
}

}  // namespace

std::vector<ToolCallText> parse_tool_calls(std::string_view turn) {
  std::vector<ToolCallText> calls;
  for (std::size_t at = turn.find(kOpen); at != std::string_view::npos; at = turn.find(kOpen, at)) {
    at += kOpen.size();
    const std::size_t close = turn.find(kClose, at);
    if (close == std::string_view::npos) {
      calls.push_back({"", json::object(), "the call is not closed by </tool_call>"});
      break;
    }
    calls.push_back(read_call(turn.substr(at, close - at)));
    at = close + kClose.size();
  }
  return calls;
}

}  // namespace rlhf

#include "rollout/environment/tool_environment.h"

#include <algorithm>
#include <exception>
#include <utility>

#include "rlhf/core/error.h"

namespace rlhf {
namespace {

class ToolEnvironment : public Environment {
 public:
  ToolEnvironment(const ToolEnvironmentFactory& factory, std::unique_ptr<Environment> user)
      : factory_(factory), user_(std::move(user)) {}

  Observation observe(const AssistantTurn& turn) override {
    const std::vector<ToolCallText> calls = parse_tool_calls(turn.text);
    Observation observation;
    if (calls.empty()) {
      if (user_) return user_->observe(turn);
      observation.over = true;
      return observation;
    }
    const auto most = static_cast<std::size_t>(factory_.limits().max_calls_per_turn);
    for (std::size_t i = 0; i < calls.size() && i <= most; ++i) {
      const ToolResult result =
          i < most ? factory_.call(calls[i], turn.limit)
                   : ToolResult::error(concat("at most ", most, " calls in a turn; this one and ",
                                              calls.size() - i - 1, " after it were not made"));
      observation.tool_calls += 1;
      observation.tool_errors += result.is_error;
      observation.messages.push_back({"tool", bounded_text(result.text, factory_.limits().max_result_bytes)});
    }
    return observation;
  }

 private:
  const ToolEnvironmentFactory& factory_;
  std::unique_ptr<Environment> user_;
};

}  // namespace

ToolEnvironmentFactory::ToolEnvironmentFactory(std::vector<std::shared_ptr<const Tool>> tools,
                                               const ToolLimits& limits,
                                               std::shared_ptr<const EnvironmentFactory> user)
    : tools_(std::move(tools)), limits_(limits), user_(std::move(user)) {
  for (std::size_t i = 0; i < tools_.size(); ++i) {
    const std::string& name = tools_[i]->schema().name;
    RLHF_CHECK(!name.empty(), "tool ", i + 1, " has no name");
    for (std::size_t j = 0; j < i; ++j)
      RLHF_CHECK(tools_[j]->schema().name != name, "tools ", j + 1, " and ", i + 1, " are both called '",
                 name, "'");
  }
}

std::unique_ptr<Environment> ToolEnvironmentFactory::begin(const EpisodeStart& start) const {
  return std::make_unique<ToolEnvironment>(*this, user_ ? user_->begin(start) : nullptr);
}

bool ToolEnvironmentFactory::answers_at_once() const {
  return std::ranges::all_of(tools_, [](const auto& tool) { return tool->answers_at_once(); }) &&
         (!user_ || user_->answers_at_once());
}

nlohmann::ordered_json ToolEnvironmentFactory::schemas() const {
  auto schemas = nlohmann::ordered_json::array();
  for (const auto& tool : tools_) schemas.push_back(to_json(tool->schema()));
  return schemas;
}

ToolResult ToolEnvironmentFactory::call(const ToolCallText& call, const CallLimit& limit) const {
  if (!call.error.empty()) return ToolResult::error(call.error);
  const auto tool =
      std::ranges::find_if(tools_, [&](const auto& one) { return one->schema().name == call.name; });
  if (tool == tools_.end()) {
    std::string names;
    for (const auto& one : tools_) names += (names.empty() ? "" : ", ") + one->schema().name;
    return ToolResult::error(concat("there is no tool '", call.name, "'; expected one of: ", names));
  }
  try {
    if (const auto problem = check_arguments((*tool)->schema().parameters, call.arguments))
      return ToolResult::error(concat(call.name, ": ", *problem));
    if (limit.expired()) return ToolResult::error(concat(call.name, ": no time was left for the call"));
    ToolResult result = (*tool)->call(call.arguments, limit);
    if (limit.expired()) return ToolResult::error(concat(call.name, ": took longer than it may"));
    return result;
  } catch (const std::exception& error) {
    return ToolResult::error(concat(call.name, ": ", error.what()));
  } catch (...) {
    return ToolResult::error(concat(call.name, ": failed"));
  }
}

}  // namespace rlhf

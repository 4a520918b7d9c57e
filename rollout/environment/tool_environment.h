#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <vector>

#include "rollout/environment/environment.h"
#include "rollout/environment/tool.h"
#include "rollout/environment/tool_call.h"

namespace rlhf {

/// Bounds of what tools add to a context.
struct ToolLimits {
  std::int64_t max_calls_per_turn = 8;  ///< further ones are errors
  std::size_t max_result_bytes = 4096;  ///< of one call's text; the rest is left out with a note
};

/// Tools that the policy calls inside its turns (tool_call.h has the form). Every call of a turn is answered
/// by one message of role `tool`, in order. A malformed call, an unknown tool, wrong arguments, an exception
/// and a call that takes too long are answered by {"error": ...}. A turn without call goes to the user, if
/// there is one, and else ends the episode.
class ToolEnvironmentFactory : public EnvironmentFactory {
 public:
  /// @param user answers turns without call; null = they end the episode
  /// @throws InvalidArgument for a tool without name or a name given twice
  ToolEnvironmentFactory(std::vector<std::shared_ptr<const Tool>> tools, const ToolLimits& limits,
                         std::shared_ptr<const EnvironmentFactory> user = nullptr);

  std::unique_ptr<Environment> begin(const EpisodeStart& start) const override;
  /// True when all tools and the user do.
  bool answers_at_once() const override;

  /// The tools' schemas, as a list for a chat template's `tools`.
  nlohmann::ordered_json schemas() const;
  /// Runs one call; never throws.
  ToolResult call(const ToolCallText& call, const CallLimit& limit) const;
  const ToolLimits& limits() const { return limits_; }

 private:
  std::vector<std::shared_ptr<const Tool>> tools_;
  ToolLimits limits_;
  std::shared_ptr<const EnvironmentFactory> user_;
};

}  // namespace rlhf

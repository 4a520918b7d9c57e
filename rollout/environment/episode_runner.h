#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "rlhf/config/field.h"
#include "rlhf/core/clock.h"
#include "rlhf/data/sample.h"
#include "rollout/engine/turns.h"
#include "rollout/environment/environment.h"

namespace rlhf {

/// When an episode ends by itself. Tokens are limited by the request (StopOptions::max_new_tokens counts
/// observations, too) and by the model's context.
struct EpisodeLimits {
  std::int64_t max_turns = 8;
  double max_seconds = 0;
  double max_reply_seconds = 30;

  template <class V>
  void visit_fields(V& v) {
    v.field("max_turns", max_turns, "Turns of the policy in an episode", {1, 1 << 20});
    v.field("max_seconds", max_seconds,
            "Seconds from an episode's first token after which it ends as it is; 0 = any", {0, 1e9});
    v.field("max_reply_seconds", max_reply_seconds,
            "Seconds that all tools of one turn may take together; a later result becomes an error that the "
            "policy reads",
            {0.001, 1e9});
  }
};

/// Tokens of an observation. @param ended_by the end token that the policy wrote; -1 when its turn ended
/// otherwise. Called from several threads at once.
using ObservationEncoder =
    std::function<std::vector<TokenId>(const Observation& observation, TokenId ended_by)>;

struct EpisodeRunnerOptions {
  EpisodeLimits limits;
  int workers = 4;               ///< threads that call environments which do not answer at once
  Clock clock = steady_clock();  ///< the engine's, where its time is not the machine's
};

/// Runs episodes: while one waits for its environment, the engine decodes others. Give a request the handler
/// of its prompt (GenerationRequest::turns), and each of its samples becomes an episode. The K/V of all turns
/// stay where they are. A sample is what it would be alone, token for token, as long as its environment's
/// answers depend on the episode only and no time limit is hit.
///
/// Handlers may outlive the runner's other users but not the engine's requests; they share its threads.
class EpisodeRunner {
 public:
  EpisodeRunner(std::shared_ptr<const EnvironmentFactory> factory, ObservationEncoder encode,
                const EpisodeRunnerOptions& options);

  std::shared_ptr<TurnHandler> handler(const Prompt& prompt) const;
  const EnvironmentFactory& factory() const;

 private:
  class Handler;
  struct Shared;
  std::shared_ptr<const Shared> shared_;
};

}  // namespace rlhf

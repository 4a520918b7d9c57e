#include "rlhf/train/episode_metrics.h"

#include <algorithm>

namespace rlhf {

void append_episode_metrics(const std::vector<const Sample*>& samples, Metrics& metrics) {
  const auto is_answered = [](const Sample* sample) { return !sample->turns.empty(); };
  if (std::ranges::none_of(samples, is_answered)) return;
  double turns = 0, calls = 0, errors = 0, seconds = 0, reward = 0, tokens = 0, masked = 0, cut = 0,
         failed = 0;
  for (const Sample* sample : samples) {
    turns += static_cast<double>(sample->turns.size());
    for (const SampleTurn& turn : sample->turns) {
      calls += turn.tool_calls;
      errors += turn.tool_errors;
      seconds += turn.seconds;
      reward += turn.reward;
    }
    tokens += static_cast<double>(sample->mask.size());
    masked += static_cast<double>(std::ranges::count(sample->mask, 0));
    cut += is_cut_short(sample->finish_reason);
    failed += sample->finish_reason == FinishReason::kEnvironmentError;
  }
  const auto n = static_cast<double>(samples.size());
  metrics.emplace_back("episode/turns", turns / n);
  metrics.emplace_back("episode/reward", reward / n);
  metrics.emplace_back("episode/tool_calls", calls / n);
  metrics.emplace_back("episode/tool_errors", calls > 0 ? errors / calls : 0);
  metrics.emplace_back("episode/observation_fraction", masked / tokens);
  metrics.emplace_back("episode/cut_short_fraction", cut / n);
  metrics.emplace_back("episode/environment_errors", failed);
  metrics.emplace_back("time/environment_s", seconds);
}

}  // namespace rlhf

#pragma once

#include "rlhf/ppo/kl.h"
#include "rlhf/schedule/recorder.h"
#include "rlhf/train/checkpoint.h"
#include "rlhf/train/ppo_iteration.h"

namespace rlhf {

/// Trains a policy with PPO or a relative. One iteration is PpoIteration's tasks under a scheduling policy.
class PpoTrainer {
 public:
  PpoTrainer(LanguageModel& policy, const FrozenModels& frozen, const PpoSetting& setting);

  /// Runs all iterations. @throws StageStopped; Error naming iteration and phase when a number is not finite.
  void run();

 private:
  void report(const PpoIteration& iteration, const schedule::IterationTimes& times, std::int64_t number);
  void log_samples(const PpoIteration& iteration, std::int64_t number);

  PpoSetting setting_;
  PpoModels models_;
  ppo::KlController kl_;
};

}  // namespace rlhf

#pragma once

#include "rlhf/ppo/kl.h"
#include "rlhf/schedule/executor.h"
#include "rlhf/train/checkpoint.h"
#include "rlhf/train/ppo_workload.h"

namespace rlhf {

/// Trains a policy with PPO or a relative: PpoWorkload's iterations under the scheduling policy of the run.
class PpoTrainer {
 public:
  PpoTrainer(LanguageModel& policy, const FrozenModels& frozen, const PpoSetting& setting);

  /// Runs all iterations. @throws StageStopped; Error naming iteration and phase when a number is not finite.
  void run();

 private:
  void say_correction() const;
  void report(const PpoWorkload::Batch& batch, const schedule::IterationTimes& times, std::int64_t number);
  Hashes hashes_after(const std::vector<PpoResponse>& responses) const;
  void log_samples(const std::vector<PpoResponse>& responses, std::int64_t number);

  PpoSetting setting_;
  std::unique_ptr<schedule::Policy> policy_;
  PpoModels models_;
  ppo::KlController kl_;
};

}  // namespace rlhf

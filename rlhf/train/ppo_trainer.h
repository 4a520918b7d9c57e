#pragma once

#include "rlhf/report/proxy_alarm.h"
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
  /// What a person should look at, in the order in which it was seen.
  const std::vector<std::string>& warnings() const { return warnings_; }

 private:
  void say_correction() const;
  void report(const PpoWorkload::Batch& batch, const schedule::IterationTimes& times, std::int64_t number);
  Hashes hashes_after(const std::vector<PpoResponse>& responses) const;
  void watch_proxy(const Metrics& metrics, std::int64_t number);
  void log_samples(const std::vector<PpoResponse>& responses, std::int64_t number);

  PpoSetting setting_;
  std::unique_ptr<schedule::Policy> policy_;
  PpoModels models_;
  PpoState state_;
  ProxyAlarm alarm_;
  std::vector<std::string> warnings_;
};

}  // namespace rlhf

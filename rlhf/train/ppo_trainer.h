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
  double take_flops(const PpoRollout& rollout);
  void log_samples(const std::vector<PpoResponse>& responses, std::int64_t number);

  PpoSetting setting_;
  std::unique_ptr<schedule::Policy> policy_;
  PpoModels models_;
  PpoState state_;
  double peak_flops_per_s_ = 0;  ///< of this machine's products
  double passed_flops_ = 0;      ///< of scoring and training, until the last report
  ProxyAlarm alarm_;
  std::vector<std::string> warnings_;
};

}  // namespace rlhf

#pragma once

#include "rlhf/train/group_sampler.h"
#include "rlhf/train/pair_loss.h"

namespace rlhf {

/// Preference learning on the policy's own responses (online DPO, Guo et al. 2024).
struct OnlinePreferenceOptions {
  std::int64_t iterations = 20;  ///< each: sample, pair, one optimizer step
  std::int64_t prompts_per_step = 16;
  GroupSamplerOptions sampler;
  std::int64_t max_tokens_per_micro_batch = 2048;
  ppo::PreferenceOptions loss;
  OptimizerOptions optimizer;

  template <class V>
  void visit_fields(V& v) {
    v.field("iterations", iterations, "Rounds of sampling and one optimizer step", {1, 1e9});
    v.field("prompts_per_step", prompts_per_step, "Prompts of each iteration; each gives at most one pair",
            {1, 1e6});
    sampler.visit_fields(v);
    v.field("max_tokens_per_micro_batch", max_tokens_per_micro_batch,
            "Tokens per forward/backward pass; heads that sequences have in common count once", {2, 1e7});
    v.group("loss", loss, "Loss on pairs of a prompt's best and worst response");
    v.group("optimizer", optimizer, "AdamW");
  }
};

/// The stage `online_preference`: each iteration samples several responses to each prompt and takes the best
/// and the worst as a pair; groups whose scores are all equal give none. Log-probs are taken at temperature
/// 1, whatever the sampling temperature.
class OnlinePreference {
 public:
  /// @param reference may be null when the loss needs none
  /// @param reward_model may be null when reward_model_weight is 0
  /// @throws InvalidArgument when there are no prompts, no judges or no reference
  OnlinePreference(LanguageModel& policy, const Parameters<float>* reference,
                   const Parameters<float>* reward_model, const TaskData& data, const RolloutOptions& rollout,
                   const OnlinePreferenceOptions& options, const StageContext& context);

  /// Trains the policy. @throws StageStopped, Error naming the iteration when the loss is not finite
  void run();

 private:
  PairMeasure train(const std::vector<ResponseGroup>& groups);

  const OnlinePreferenceOptions& options_;
  const StageContext& context_;
  Parameters<float>& policy_;
  const Parameters<float>* reference_;
  SequencePass<float> pass_;
  PairLoss loss_;
  Optimizer<float> optimizer_;
  GroupSampler sampler_;
};

}  // namespace rlhf

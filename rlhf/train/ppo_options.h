#pragma once

#include <cstdint>

#include "rlhf/ppo/options.h"
#include "rlhf/train/batching.h"

namespace rlhf {

struct RolloutOptions;

enum class OldLogProbs { kAuto, kRollout, kRecompute };
enum class CriticInit { kPolicy, kReward };
enum class WeightMismatch { kTruncate, kIgnore };

/// The PPO stage: the algorithm and what surrounds it.
struct PpoStageOptions {
  std::int64_t iterations = 20;  ///< rollout batches
  std::int64_t max_tokens_per_micro_batch =
      1024;  ///< prompt and response tokens of one forward/backward pass
  config::MemorySize trunk_cache{std::uint64_t{256} << 20, {}};  ///< see visit_fields
  double rules_weight = 1;         ///< weight of the rules' score; 0 = they only watch
  double reward_model_weight = 0;  ///< weight of the reward model's score beside the rules
  bool step_rewards = false;       ///< a step's reward at its last token, instead of one score at the end
  OldLogProbs old_log_probs = OldLogProbs::kAuto;
  WeightMismatch weight_mismatch = WeightMismatch::kTruncate;
  CriticInit critic_init = CriticInit::kPolicy;
  ItemOrder prompt_order = ItemOrder::kShuffled;
  std::int64_t samples_to_log = 4;  ///< responses written to samples/ per iteration
  /// Passes are as wide as the batch's longest response and share nothing, as other trainers' are: for
  /// comparisons, no option of a run.
  bool padded_passes = false;
  ppo::PpoOptions algorithm;

  template <class V>
  void visit_fields(V& v) {
    v.field("iterations", iterations, "Rollout batches", {1, 1e9});
    v.field("max_tokens_per_micro_batch", max_tokens_per_micro_batch,
            "Tokens per pass; heads that sequences have in common count once", {2, 1e8});
    v.field(
        "trunk_cache", trunk_cache,
        "Memory for the frozen layers' results of a rollout batch, so that they are computed once and not "
        "once an epoch; a larger batch computes them again, with equal results");
    v.field("rules_weight", rules_weight,
            "Weight of the rules' score in what is learned; 0 = rules are only reported", {-1e6, 1e6});
    v.field("reward_model_weight", reward_model_weight, "Weight of the reward model's score beside the rules",
            {-1e6, 1e6});
    v.field("step_rewards", step_rewards,
            "reward.target: steps - give each step's reward at its last token, not one score at the end");
    v.choice("old_log_probs", old_log_probs,
             {{"auto", OldLogProbs::kAuto},
              {"rollout", OldLogProbs::kRollout},
              {"recompute", OldLogProbs::kRecompute}},
             "Log-probs the ratio is formed against: the sampler's, or a forward pass of the trainer. auto "
             "takes the "
             "sampler's where no filter changes its distribution, rollout.weights is fp32 and "
             "rollout.kv_dtype auto, since both are then equal bit for bit (on a GPU to rounding)");
    v.choice(
        "weight_mismatch", weight_mismatch,
        {{"truncate", WeightMismatch::kTruncate}, {"ignore", WeightMismatch::kIgnore}},
        "What rollout.weights other than fp32, or rollout.kv_dtype: fp8, mean where algorithm.correction is "
        "off: truncated importance weights of tokens (level token, mode truncate, its upper bound), or "
        "nothing");
    v.choice("critic_init", critic_init, {{"policy", CriticInit::kPolicy}, {"reward", CriticInit::kReward}},
             "Weights the critic starts from");
    v.choice("prompt_order", prompt_order, {{"shuffled", ItemOrder::kShuffled}, {"given", ItemOrder::kGiven}},
             "Order in which prompts are taken: shuffled anew every epoch, or as the data has them");
    v.field("samples_to_log", samples_to_log, "Responses written to samples/ per iteration", {0, 1e6});
    v.group("algorithm", algorithm, "PPO and its relatives; preset: NAME takes configs/presets/NAME.yaml");
  }
  /// Whether rounded samples are corrected by weight_mismatch, because nothing else corrects them.
  bool corrects_rounding(const RolloutOptions& rollout) const;
  /// Reports combinations that cannot work.
  void validate(config::Problems& problems) const {
    if (rules_weight == 0 && reward_model_weight == 0 && algorithm.distillation.coefficient == 0)
      problems.add("rules_weight",
                   "is 0, and so are reward_model_weight and algorithm.distillation.coefficient: "
                   "there is nothing to learn from");
    if (step_rewards && reward_model_weight == 0)
      problems.add("step_rewards", "needs a reward_model_weight that is not 0");
    if (step_rewards && algorithm.advantage.greedy_baseline)
      problems.add("step_rewards", "algorithm.advantage.greedy_baseline compares scores of whole responses");
    if (step_rewards && algorithm.reward.normalization != ppo::ScoreNormalization::kNone)
      problems.add("step_rewards", "algorithm.reward.normalization looks at scores of whole responses");
    const bool corrects =
        algorithm.correction.level != ppo::CorrectionLevel::kOff || !algorithm.correction.rejection.empty();
    if (old_log_probs == OldLogProbs::kRollout && corrects)
      problems.add("old_log_probs",
                   "rollout leaves algorithm.correction no difference to look at; use auto or recompute");
  }
};

}  // namespace rlhf

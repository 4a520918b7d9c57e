#pragma once

// How parameters of TRL's trainers translate into options of this library: one place for vector files and
// trainer records.

#include <cstdint>
#include <string>
#include <vector>

#include "rlhf/ppo/group_advantage.h"
#include "rlhf/ppo/policy_loss.h"
#include "rlhf/train/lr_schedule.h"
#include "rlhf/train/optimizer.h"
#include "rlhf/verify/golden_case.h"

namespace rlhf::verify {

/// What a loss_type of GRPOTrainer stands for.
struct TrlLossType {
  ppo::PolicyObjective objective;
  ppo::Aggregation aggregation;
  bool global_tokens;  ///< normalised by the tokens of the optimizer step
};
/// @throws InvalidArgument for a loss_type that is not known.
TrlLossType trl_loss_type(const std::string& name);

/// Policy loss of GRPOTrainer from the parameters of a case. Lower bound: epsilon_low, or epsilon where the
/// trainer's own configuration is listed; epsilon_high falls back to it.
ppo::PolicyLossOptions trl_policy_options(GoldenCase& golden, const TrlLossType& type);

/// One micro-batch of an optimizer step, as TRL's normalisers see it.
struct TrlMicroBatch {
  double rows = 0;
  double accumulation = 1;          ///< micro-batches of the optimizer step
  double steps_per_generation = 1;  ///< micro-batches of the generation batch
  double tokens = 0;                ///< counting tokens of the generation batch
};
ppo::AggregationContext trl_loss_context(const TrlLossType& type, const TrlMicroBatch& batch);

/// The rewards of a generation batch; rows [i n, (i + 1) n) answer one prompt, n = num_generations.
struct TrlRewards {
  std::string trainer;  ///< grpo or rloo
  ppo::RewardTerms terms;
  std::vector<double> sequence_kl;  ///< per response; empty = no KL in the reward (rloo)
};
/// Reward terms from a [response][function] matrix, weighted by reward_weights.
ppo::RewardTerms trl_reward_terms(GoldenCase& golden, const Tensor& rewards);
/// Prompt number of each response.
std::vector<std::uint64_t> trl_groups(GoldenCase& golden, std::size_t responses);
/// Group statistics and scale of the trainer ("grpo", "rloo").
ppo::GroupOptions trl_group_options(GoldenCase& golden, const std::string& trainer);
/// Clip of the score (rloo's reward_clip_range).
ppo::ScoreOptions trl_score_options(GoldenCase& golden);
/// Advantage of each response.
std::vector<double> trl_response_advantages(GoldenCase& golden, const TrlRewards& rewards);

/// Learning-rate shape of a transformers scheduler name with that function's defaults ("linear", "cosine",
/// ...). @throws InvalidArgument for a name that is not known.
LrScheduleOptions lr_schedule_named(const std::string& name);
/// The schedule of a trainer configuration: lr_scheduler_type (as "SchedulerType.LINEAR") and warmup_steps.
LrScheduleOptions trl_lr_schedule(GoldenCase& golden, double base_rate);

/// AdamW and schedule of a trainer configuration. @throws InvalidArgument for weight decay, from which TRL
/// exempts norms and biases; this library's optimizer does not.
OptimizerOptions trl_optimizer(GoldenCase& golden);

}  // namespace rlhf::verify

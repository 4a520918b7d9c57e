#pragma once

#include <cstddef>

#include "rlhf/config/schema.h"
#include "rlhf/ppo/gae.h"
#include "rlhf/ppo/group_advantage.h"
#include "rlhf/ppo/kl.h"
#include "rlhf/ppo/policy_loss.h"
#include "rlhf/ppo/rollout_correction.h"
#include "rlhf/ppo/score_normalizer.h"
#include "rlhf/ppo/shaping.h"
#include "rlhf/ppo/token_reward.h"
#include "rlhf/ppo/value_loss.h"
#include "rlhf/ppo/whiten.h"
#include "rlhf/train/lr_schedule.h"

namespace rlhf::ppo {

/// How the rewards of a response become advantages of its tokens.
enum class AdvantageForm {
  kGae,         ///< GAE over token rewards and values (needs a critic)
  kRewardToGo,  ///< discounted token rewards from here on (REINFORCE, REINFORCE++, OpenRLHF's group methods)
  kSequence,    ///< the response's advantage on each of its tokens (GRPO, RLOO, OPO, GPG)
  kTokenBaseline,          ///< reward-to-go minus the variance-optimal baseline per position
  kTokenBaselineByNumber,  ///< the same, aligned by number of the counting token (multi-turn)
};

struct AdvantageOptions {
  AdvantageForm form = AdvantageForm::kGae;
  GaeOptions gae;  ///< its gamma and mask also serve kRewardToGo
  GroupOptions group{GroupBaseline::kNone,
                     GroupScale::kNone};     ///< applied to the scores of the responses first
  bool greedy_baseline = false;              ///< subtract the score of the greedy response (ReMax)
  Whitening whitening = Whitening::kBessel;  ///< over the counting tokens of the batch

  template <class V>
  void visit_fields(V& v) {
    v.choice("form", form,
             {{"gae", AdvantageForm::kGae},
              {"reward_to_go", AdvantageForm::kRewardToGo},
              {"sequence", AdvantageForm::kSequence},
              {"token_baseline", AdvantageForm::kTokenBaseline},
              {"token_baseline_by_number", AdvantageForm::kTokenBaselineByNumber}},
             "How rewards become advantages of tokens");
    v.group("gae", gae, "Discounting and GAE");
    v.group("group", group, "Baseline and scale among the responses of a prompt");
    v.field("greedy_baseline", greedy_baseline, "Subtract the score of the greedy response (ReMax)");
    v.choice("whitening", whitening,
             {{"none", Whitening::kNone},
              {"bessel", Whitening::kBessel},
              {"bessel_shifted", Whitening::kBesselShifted},
              {"biased", Whitening::kBiased},
              {"centre", Whitening::kCentre}},
             "Whitening of the advantages over the batch");
  }
};

/// Where the KL to the reference enters the reward.
enum class KlRewardPlacement {
  kNone,
  kToken,     ///< -coefficient * kl_t at each token (PPO, REINFORCE++)
  kSequence,  ///< -coefficient * sum of kl_t off the score, before any baseline (TRL RLOO)
};

struct KlRewardOptions {
  KlRewardPlacement placement = KlRewardPlacement::kToken;
  double coefficient = 0.05;  ///< initial value of the controller
  KlEstimatorOptions estimator;
  KlControllerOptions controller;

  template <class V>
  void visit_fields(V& v) {
    v.choice("placement", placement,
             {{"none", KlRewardPlacement::kNone},
              {"token", KlRewardPlacement::kToken},
              {"sequence", KlRewardPlacement::kSequence}},
             "Where the KL to the reference enters the reward");
    v.field("coefficient", coefficient, "Weight of the KL in the reward", config::at_least(0));
    v.group("estimator", estimator, "Estimate of the KL");
    v.group("controller", controller, "How the coefficient changes");
  }
};

/// Whether the score is clipped before the group baseline (TRL) or after it (OpenRLHF).
enum class ScoreClipStage { kBeforeBaseline, kAfterBaseline };

struct RewardOptions {
  ScoreNormalization normalization = ScoreNormalization::kNone;  ///< before everything else
  ScoreOptions score;
  ScoreClipStage clip_stage = ScoreClipStage::kBeforeBaseline;
  ScorePlacement placement = ScorePlacement::kLastToken;
  bool whiten = false;  ///< whiten token rewards, mean kept (TRL whiten_rewards)
  LengthShapingOptions length;
  bool mask_truncated = false;  ///< truncated responses train nothing (DAPO's overlong filtering)

  template <class V>
  void visit_fields(V& v) {
    v.choice(
        "normalization", normalization,
        {{"none", ScoreNormalization::kNone},
         {"running", ScoreNormalization::kRunning},
         {"reference", ScoreNormalization::kReference}},
        "What scores are measured against: nothing, all scores of the run so far, or the mean of the policy "
        "before the stage");
    v.group("score", score, "Penalty and clip of the score of a response");
    v.choice("clip_stage", clip_stage,
             {{"before_baseline", ScoreClipStage::kBeforeBaseline},
              {"after_baseline", ScoreClipStage::kAfterBaseline}},
             "When the score is clipped");
    v.choice("placement", placement,
             {{"last_token", ScorePlacement::kLastToken}, {"after_last", ScorePlacement::kAfterLast}},
             "Which position gets the score");
    v.field("whiten", whiten, "Whiten token rewards over the batch, mean kept");
    v.group("length", length, "Penalties for long and truncated responses");
    v.field("mask_truncated", mask_truncated, "Leave truncated responses out of the loss");
  }
};

/// Values at how many positions enter the value loss.
enum class ValuePositions {
  kTokens,         ///< n: one before each token
  kTokensAndNext,  ///< n + 1: also after the last token, where the row has room (TRL)
};

struct OptimizerOptions {
  double learning_rate = 3e-6;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double epsilon = 1e-8;
  double weight_decay = 0;
  double max_grad_norm = 1.0;  ///< global-norm clip; 0 = off
  LrScheduleOptions schedule;

  template <class V>
  void visit_fields(V& v) {
    v.field("learning_rate", learning_rate, "Base learning rate", config::at_least(0));
    v.field("beta1", beta1, "AdamW beta1", config::fraction());
    v.field("beta2", beta2, "AdamW beta2", config::fraction());
    v.field("epsilon", epsilon, "AdamW epsilon", config::positive());
    v.field("weight_decay", weight_decay, "AdamW weight decay", config::at_least(0));
    v.field("max_grad_norm", max_grad_norm, "Global norm the gradients are clipped to; 0 = off",
            config::at_least(0));
    v.group("schedule", schedule, "Learning rate over the run");
  }
};

/// Whether policy and value share one optimizer and one loss.
enum class CriticUpdate { kNone, kJoint, kSeparate };

/// DAPO's dynamic sampling: groups whose scores are all equal are sampled again.
struct DynamicSamplingOptions {
  bool enabled = false;
  std::size_t max_rounds = 10;  ///< further sampling rounds before the batch goes on with what it has

  template <class V>
  void visit_fields(V& v) {
    v.field("enabled", enabled, "Sample groups without spread again");
    v.field("max_rounds", max_rounds, "Bound of the further rounds");
  }
};

/// How the reverse KL of the policy to a teacher enters.
enum class DistillationEstimate {
  kSampled,  ///< A_t += coefficient (lp_teacher - lp_old) of the sampled token: an unbiased policy gradient
  kExact,    ///< loss += coefficient KL(pi || teacher) over the vocabulary, of every sampled position
};

/// On-policy distillation: the policy's own samples, graded token by token by a teacher (Agarwal et al. 2024,
/// arXiv 2306.13649, with lambda = 1 and reverse KL; Lu & Thinking Machines 2025).
struct DistillationOptions {
  double coefficient = 0;  ///< 0 = none
  DistillationEstimate estimate = DistillationEstimate::kSampled;

  template <class V>
  void visit_fields(V& v) {
    v.field("coefficient", coefficient, "Weight of the reverse KL to distillation.teacher; 0 = none",
            config::at_least(0));
    v.choice("estimate", estimate,
             {{"sampled", DistillationEstimate::kSampled}, {"exact", DistillationEstimate::kExact}},
             "From the sampled token, as part of its advantage, or over the whole vocabulary, as a loss");
  }
};

/// Everything that distinguishes PPO and its relatives. Defaults are TRL's PPO (preset trl-ppo).
struct PpoOptions {
  std::size_t prompts_per_step = 64;
  std::size_t samples_per_prompt = 1;
  std::size_t epochs = 4;        ///< passes over a rollout batch
  std::size_t mini_batches = 1;  ///< optimizer steps per pass
  RewardOptions reward;
  KlRewardOptions kl;
  AdvantageOptions advantage;
  RolloutCorrectionOptions correction;
  PolicyLossOptions policy;
  ValueLossOptions value;
  ValuePositions value_positions = ValuePositions::kTokensAndNext;
  CriticUpdate critic_update = CriticUpdate::kJoint;
  OptimizerOptions optimizer;
  OptimizerOptions critic_optimizer;  ///< only with CriticUpdate::kSeparate
  DynamicSamplingOptions dynamic_sampling;
  DistillationOptions distillation;

  template <class V>
  void visit_fields(V& v) {
    v.field("prompts_per_step", prompts_per_step, "Prompts of a rollout batch", config::at_least(1));
    v.field("samples_per_prompt", samples_per_prompt, "Responses per prompt", config::at_least(1));
    v.field("epochs", epochs, "Passes over a rollout batch", config::at_least(1));
    v.field("mini_batches", mini_batches, "Optimizer steps per pass", config::at_least(1));
    v.group("reward", reward, "From scores to token rewards");
    v.group("kl", kl, "KL to the reference in the reward");
    v.group("advantage", advantage, "From token rewards to advantages");
    v.group("correction", correction, "Mismatch between sampler and trainer");
    v.group("policy", policy, "Policy loss");
    v.group("value", value, "Value loss");
    v.choice("value_positions", value_positions,
             {{"tokens", ValuePositions::kTokens}, {"tokens_and_next", ValuePositions::kTokensAndNext}},
             "Positions that enter the value loss");
    v.choice("critic_update", critic_update,
             {{"none", CriticUpdate::kNone},
              {"joint", CriticUpdate::kJoint},
              {"separate", CriticUpdate::kSeparate}},
             "Whether a critic is trained, and with which optimizer");
    v.group("optimizer", optimizer, "Optimizer of the policy (and of a joint critic)");
    v.group("critic_optimizer", critic_optimizer, "Optimizer of a separate critic");
    v.group("dynamic_sampling", dynamic_sampling, "Resampling of groups without spread");
    v.group("distillation", distillation, "Reverse KL to a teacher on the policy's own samples");
  }

  /// Reports combinations that cannot work.
  void validate(config::Problems& problems) const;
};

/// True when the advantages need values, and so a critic.
bool needs_critic(const PpoOptions& options);
/// True when the advantages need the sum of squared probabilities at every position.
bool needs_sum_pi_squared(const PpoOptions& options);
/// True when reward or loss needs log-probs of the reference.
bool needs_reference(const PpoOptions& options);
/// True when advantages or loss can be computed only once the whole batch is scored (whitening, batch
/// baselines, rejection, normalisers that are not a factor).
bool needs_whole_batch(const PpoOptions& options);
/// The key (below ppo.algorithm) that makes it so, the first of them; null when nothing does.
const char* whole_batch_key(const PpoOptions& options);

}  // namespace rlhf::ppo

extern template rlhf::config::Schema rlhf::config::Schema::of(rlhf::ppo::PpoOptions&);

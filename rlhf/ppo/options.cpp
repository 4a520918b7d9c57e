#include "rlhf/ppo/options.h"

namespace rlhf::ppo {

bool needs_critic(const PpoOptions& options) {
  return options.advantage.form == AdvantageForm::kGae;
}

bool needs_sum_pi_squared(const PpoOptions& options) {
  return options.advantage.form == AdvantageForm::kTokenBaseline ||
         options.advantage.form == AdvantageForm::kTokenBaselineByNumber;
}

bool needs_reference(const PpoOptions& options) {
  const bool in_reward = options.kl.placement != KlRewardPlacement::kNone && options.kl.coefficient > 0;
  return in_reward || options.policy.kl.coefficient > 0;
}

const char* whole_batch_key(const PpoOptions& options) {
  if (options.advantage.whitening != Whitening::kNone) return "advantage.whitening";
  if (options.reward.whiten) return "reward.whiten";
  if (options.reward.normalization != ScoreNormalization::kNone) return "reward.normalization";
  if (options.advantage.group.baseline == GroupBaseline::kBatchMean) return "advantage.group.baseline";
  if (options.advantage.group.scale == GroupScale::kBatch ||
      options.advantage.group.scale == GroupScale::kNonZeroShare)
    return "advantage.group.scale";
  if (options.correction.batch_normalize) return "correction.batch_normalize";
  if (!options.correction.rejection.empty()) return "correction.rejection";
  if (needs_totals(options.policy)) return "policy.aggregation";
  if (needs_critic(options) && needs_widest_row(options.value.aggregation)) return "value.aggregation";
  return nullptr;
}

bool needs_whole_batch(const PpoOptions& options) {
  return whole_batch_key(options) != nullptr;
}

namespace {

bool needs_group(GroupBaseline baseline) {
  return baseline == GroupBaseline::kMean || baseline == GroupBaseline::kLeaveOneOut ||
         baseline == GroupBaseline::kLengthWeighted || baseline == GroupBaseline::kBestOfGroup;
}

void check_policy(const PolicyLossOptions& policy, config::Problems& problems) {
  if (policy.dual_clip > 0 && policy.dual_clip <= 1) {
    problems.add("policy.dual_clip", "must be 0 (off) or above 1");
  }
  if (policy.log_ratio_min && policy.log_ratio_max && *policy.log_ratio_min > *policy.log_ratio_max) {
    problems.add("policy.log_ratio_min", "is above policy.log_ratio_max");
  }
  if (policy.objective == PolicyObjective::kGeometricMean && policy.ratio_level != RatioLevel::kToken) {
    problems.add("policy.ratio_level",
                 "geometric_mean forms its own ratio of the response; leave it at token");
  }
}

}  // namespace

void PpoOptions::validate(config::Problems& problems) const {
  check_policy(policy, problems);
  if (needs_critic(*this) && critic_update == CriticUpdate::kNone) {
    problems.add("critic_update", "advantage.form gae needs a critic: joint or separate");
  }
  if (!needs_critic(*this) && critic_update != CriticUpdate::kNone) {
    problems.add("critic_update", "no value is used by this advantage.form: set none");
  }
  if (needs_group(advantage.group.baseline) && samples_per_prompt < 2) {
    problems.add("samples_per_prompt", "advantage.group.baseline compares responses of a prompt: at least 2");
  }
  if (needs_sum_pi_squared(*this) && samples_per_prompt < 2) {
    problems.add("samples_per_prompt", "the token baselines compare responses of a prompt: at least 2");
  }
  if (dynamic_sampling.enabled && samples_per_prompt < 2) {
    problems.add("dynamic_sampling.enabled", "needs samples_per_prompt of at least 2");
  }
  if (reward.placement == ScorePlacement::kAfterLast && value_positions != ValuePositions::kTokensAndNext) {
    problems.add("reward.placement", "after_last needs value_positions tokens_and_next");
  }
  if (kl.estimator.gradient != KlGradient::kOwn) {
    problems.add("kl.estimator.gradient", "the KL in the reward has no gradient: leave it at own");
  }
  if (correction.bypass && correction.level != CorrectionLevel::kOff) {
    problems.add("correction.level", "correction.bypass leaves nothing to weigh: set off");
  }
  if (correction.lower > correction.upper) problems.add("correction.lower", "is above correction.upper");
  if (correction.rejection.empty() != correction.rejection_threshold.empty()) {
    problems.add("correction.rejection_threshold", "rejection and rejection_threshold go together");
  }
  if (reward.score.clip_min && reward.score.clip_max && *reward.score.clip_min > *reward.score.clip_max) {
    problems.add("reward.score.clip_min", "is above reward.score.clip_max");
  }
}

}  // namespace rlhf::ppo

template rlhf::config::Schema rlhf::config::Schema::of(rlhf::ppo::PpoOptions&);

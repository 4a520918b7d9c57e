#include "rlhf/ppo/experience.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include "rlhf/core/error.h"

namespace rlhf::ppo {
namespace {

void check_length(std::size_t actual, std::size_t expected, const char* what, std::size_t response) {
  RLHF_CHECK(actual == expected, "response ", response, ": ", actual, " ", what, " for ", expected,
             " tokens");
}

void check_response(const PpoOptions& options, const ScoredResponse& r, std::size_t index) {
  const std::size_t n = r.log_probs.size();
  RLHF_CHECK(std::isfinite(r.score), "response ", index, ": the score is ", r.score);
  if (needs_reference(options)) {
    check_length(r.reference_log_probs.size(), n, "reference log-probs", index);
  } else if (!r.reference_log_probs.empty()) {
    check_length(r.reference_log_probs.size(), n, "reference log-probs", index);
  }
  if (options.correction.level != CorrectionLevel::kOff || options.correction.bypass) {
    check_length(r.rollout_log_probs.size(), n, "rollout log-probs", index);
  }
  if (options.distillation.coefficient > 0) {
    check_length(r.teacher_log_probs.size(), n, "teacher log-probs", index);
  }
  if (!r.step_rewards.empty()) check_length(r.step_rewards.size(), n, "step rewards", index);
  if (!r.mask.empty()) check_length(r.mask.size(), n, "mask bytes", index);
  if (needs_critic(options)) {
    RLHF_CHECK(r.values.size() == n || r.values.size() == n + 1, "response ", index, ": ", r.values.size(),
               " values for ", n, " tokens, expected ", n, " or ", n + 1);
  }
}

template <class T>
void append(std::vector<T>& out, const std::vector<T>& in) {
  out.insert(out.end(), in.begin(), in.end());
}

// Flat arrays of the batch; token rewards and values still to come.
Experience lay_out(const PpoOptions& options, std::span<const ScoredResponse> responses) {
  Experience e;
  e.offsets.push_back(0);
  e.value_offsets.push_back(0);
  for (std::size_t i = 0; i < responses.size(); ++i) {
    const ScoredResponse& r = responses[i];
    check_response(options, r, i);
    const std::size_t n = r.log_probs.size();
    const std::size_t values = std::max(n, r.values.size());
    const bool dropped = r.unscored || (options.reward.mask_truncated && r.truncated);
    for (std::size_t t = 0; t < values; ++t) {
      const std::uint8_t counts = dropped ? 0 : (t < n && !r.mask.empty() ? r.mask[t] : 1);
      e.value_mask.push_back(counts);
      if (t < n) e.mask.push_back(counts);
    }
    append(e.old_log_probs, options.correction.bypass ? r.rollout_log_probs : r.log_probs);
    append(e.reference_log_probs, r.reference_log_probs);
    append(e.rollout_log_probs, r.rollout_log_probs);
    append(e.old_values, r.values);
    e.offsets.push_back(e.offsets.back() + n);
    e.value_offsets.push_back(e.value_offsets.back() + values);
  }
  if (e.reference_log_probs.size() != e.old_log_probs.size()) e.reference_log_probs.clear();
  if (e.rollout_log_probs.size() != e.old_log_probs.size()) e.rollout_log_probs.clear();
  RLHF_CHECK(count_tokens(e.rows()) > 0, "experience: none of the ", responses.size(),
             " responses has a token that counts");
  return e;
}

// KL estimate per token, 0 where no reference was given. The policy here is the one before the update.
std::vector<double> token_kl(const KlEstimatorOptions& estimator, std::span<const ScoredResponse> responses) {
  std::vector<double> kl;
  for (const ScoredResponse& r : responses) {
    for (std::size_t t = 0; t < r.log_probs.size(); ++t) {
      if (r.reference_log_probs.empty()) {
        kl.push_back(0);
      } else {
        kl.push_back(
            estimate_kl(estimator, {r.log_probs[t], r.reference_log_probs[t], r.log_probs[t]}).value);
      }
    }
  }
  return kl;
}

// Clips scores and counts what the clip has changed.
std::vector<double> clip_scores(const PpoOptions& options, const std::vector<double>& scores, Experience& e) {
  ScoreOptions clip = options.reward.score;
  if (!clip.clip_min && !clip.clip_max) return scores;
  clip.missing_eos_penalty = std::nullopt;
  std::vector<double> clipped = shape_scores(clip, scores, {});
  double changed = 0;
  for (std::size_t i = 0; i < scores.size(); ++i) changed += clipped[i] != scores[i];
  e.metrics["objective/clipped_scores_fraction"] = changed / static_cast<double>(scores.size());
  return clipped;
}

std::vector<double> shaped_scores(const PpoOptions& options, std::span<const ScoredResponse> responses,
                                  Experience& e) {
  std::vector<double> scores;
  std::vector<std::size_t> lengths;
  std::vector<std::uint8_t> truncated;
  std::vector<std::uint8_t> ended;
  for (const ScoredResponse& r : responses) {
    scores.push_back(r.score);
    lengths.push_back(r.log_probs.size());
    truncated.push_back(r.truncated);
    ended.push_back(r.ended);
  }
  scores = shape_by_length(options.reward.length, {scores, lengths, truncated});
  ScoreOptions penalty = options.reward.score;
  penalty.clip_min = penalty.clip_max = std::nullopt;
  scores = shape_scores(penalty, scores, ended);
  return options.reward.clip_stage == ScoreClipStage::kBeforeBaseline ? clip_scores(options, scores, e)
                                                                      : scores;
}

// What cannot be scored takes its group's mean, or where the group has none the mean of all, so that it moves
// no baseline away from the others.
void replace_unscored(std::span<const ScoredResponse> responses, std::vector<double>& scores) {
  if (std::ranges::none_of(responses, &ScoredResponse::unscored)) return;
  const auto mean = [&](const auto& counts) {
    double sum = 0, count = 0;
    for (std::size_t i = 0; i < responses.size(); ++i)
      if (!responses[i].unscored && counts(responses[i])) sum += scores[i], ++count;
    return count > 0 ? std::optional(sum / count) : std::nullopt;
  };
  const double all = mean([](const ScoredResponse&) { return true; }).value_or(0);
  for (std::size_t i = 0; i < responses.size(); ++i)
    if (responses[i].unscored)
      scores[i] = mean([&](const ScoredResponse& r) { return r.group == responses[i].group; }).value_or(all);
}

// Scores after baseline, scale and (OpenRLHF) the late clip.
std::vector<double> baselined_scores(const PpoOptions& options, Experience& e,
                                     std::span<const ScoredResponse> responses, std::vector<double> scores) {
  std::vector<std::uint64_t> groups;
  std::vector<double> lengths;
  for (std::size_t i = 0; i < responses.size(); ++i) {
    groups.push_back(responses[i].group);
    lengths.push_back(static_cast<double>(count_tokens(e.rows(), i)));
    if (options.advantage.greedy_baseline) scores[i] -= responses[i].greedy_score;
  }
  replace_unscored(responses, scores);
  const GroupOptions& group = options.advantage.group;
  if (group.baseline != GroupBaseline::kNone || group.scale != GroupScale::kNone) {
    scores = group_advantages(group, {scores, groups, lengths});
  }
  return options.reward.clip_stage == ScoreClipStage::kAfterBaseline ? clip_scores(options, scores, e)
                                                                     : scores;
}

// Copies token values into rows that may have one more position; the extra one gets 0.
std::vector<double> widen(const Experience& e, std::span<const double> tokens) {
  std::vector<double> wide(e.value_offsets.back(), 0.0);
  for (std::size_t row = 0; row + 1 < e.offsets.size(); ++row) {
    std::copy(tokens.begin() + static_cast<std::ptrdiff_t>(e.offsets[row]),
              tokens.begin() + static_cast<std::ptrdiff_t>(e.offsets[row + 1]),
              wide.begin() + static_cast<std::ptrdiff_t>(e.value_offsets[row]));
  }
  return wide;
}

std::vector<double> narrow(const Experience& e, std::span<const double> wide) {
  std::vector<double> tokens;
  for (std::size_t row = 0; row + 1 < e.offsets.size(); ++row) {
    const std::size_t n = e.offsets[row + 1] - e.offsets[row];
    for (std::size_t t = 0; t < n; ++t) tokens.push_back(wide[e.value_offsets[row] + t]);
  }
  return tokens;
}

void place_scores(const PpoOptions& options, std::span<const double> scores, Experience& e) {
  for (std::size_t row = 0; row < scores.size(); ++row) {
    const std::size_t begin = e.value_offsets[row];
    const std::size_t tokens = e.offsets[row + 1] - e.offsets[row];
    const bool has_slot = e.value_offsets[row + 1] - begin > tokens;
    if (options.reward.placement == ScorePlacement::kAfterLast && has_slot) {
      e.token_rewards[begin + tokens] += scores[row];
      continue;
    }
    const TokenRows rows = e.rows();
    if (const auto position = score_position(rows, row, ScorePlacement::kLastToken)) {
      e.token_rewards[begin + *position - e.offsets[row]] += scores[row];
    }
  }
}

void add_step_rewards(std::span<const ScoredResponse> responses, Experience& e) {
  for (std::size_t row = 0; row < responses.size(); ++row)
    for (std::size_t t = 0; t < responses[row].step_rewards.size(); ++t)
      e.token_rewards[e.value_offsets[row] + t] +=
          responses[row].step_rewards[t] * e.value_mask[e.value_offsets[row] + t];
}

// The sampled reverse KL to the teacher is paid token by token, without discount or baseline: a token's
// advantage says how much more probable the teacher finds it.
void distil(const PpoOptions& options, std::span<const ScoredResponse> responses, Experience& e) {
  if (options.distillation.coefficient == 0) return;
  double kl = 0;
  const auto tokens = static_cast<double>(count_tokens(e.rows()));
  for (std::size_t row = 0; row < responses.size(); ++row) {
    const ScoredResponse& r = responses[row];
    for (std::size_t t = 0; t < r.teacher_log_probs.size(); ++t) {
      const std::size_t at = e.offsets[row] + t;
      if (!e.mask[at]) continue;
      const double gap = r.log_probs[t] - r.teacher_log_probs[t];
      kl += gap / tokens;
      if (options.distillation.estimate == DistillationEstimate::kSampled)
        e.advantages[at] -= options.distillation.coefficient * gap;
    }
  }
  e.metrics["distillation/kl"] = kl;
}

void measure_kl_clamp(const PpoOptions& options, std::span<const ScoredResponse> responses, Experience& e) {
  const double bound = options.kl.estimator.clamp;
  if (bound <= 0 || options.kl.placement == KlRewardPlacement::kNone) return;
  KlEstimatorOptions unbounded = options.kl.estimator;
  unbounded.clamp = 0;
  const std::vector<double> kl = token_kl(unbounded, responses);
  double clamped = 0;
  for (std::size_t t = 0; t < kl.size(); ++t) clamped += e.mask[t] && std::abs(kl[t]) > bound;
  e.metrics["objective/clamped_kl_fraction"] = clamped / static_cast<double>(count_tokens(e.rows()));
}

void whiten_rewards(Experience& e) {
  e.token_rewards = whiten(Whitening::kBessel, MeanHandling::kKeep, e.value_rows(), e.token_rewards);
  zero_masked(e.value_rows(), e.token_rewards);
}

void gae_advantages(const PpoOptions& options, std::span<const ScoredResponse> responses, Experience& e) {
  std::vector<double> bootstrap;
  for (const ScoredResponse& r : responses) bootstrap.push_back(r.bootstrap_value);
  const AdvantagesAndReturns gae =
      compute_gae(options.advantage.gae, {e.value_rows(), e.token_rewards, e.old_values, bootstrap});
  e.returns = gae.returns;
  e.advantages = narrow(e, gae.advantages);
}

void token_baseline_advantages(const PpoOptions& options, std::span<const ScoredResponse> responses,
                               Experience& e) {
  std::vector<std::uint64_t> groups;
  std::vector<double> squares;
  for (const ScoredResponse& r : responses) {
    groups.push_back(r.group);
    append(squares, r.sum_pi_squared);
  }
  const std::vector<double> rewards = narrow(e, e.token_rewards);
  TokenBaselineInputs inputs{e.rows(), rewards, groups, e.old_log_probs, squares, e.importance_weights};
  inputs.alignment = options.advantage.form == AdvantageForm::kTokenBaseline ? TokenAlignment::kPosition
                                                                             : TokenAlignment::kTokenNumber;
  TokenBaselineResult result = optimal_token_baseline(inputs);
  e.advantages = std::move(result.advantages);
  e.returns = widen(e, result.returns);
}

// GRPO and its kin: what counts is the sum of a response's token rewards, on each of its tokens. A response
// that trains nothing has no token to hold its score, and still counts among those of its prompt.
void sequence_advantages(const PpoOptions& options, std::span<const ScoredResponse> responses,
                         std::span<const double> placed_scores, Experience& e) {
  std::vector<double> totals;
  const TokenRows rows = e.value_rows();
  for (std::size_t row = 0; row < rows.rows(); ++row) {
    double total = count_tokens(e.rows(), row) == 0 ? placed_scores[row] : 0;
    for (std::size_t t = rows.begin(row); t < rows.end(row); ++t) total += e.token_rewards[t];
    totals.push_back(total);
  }
  e.advantages = spread_over_tokens(e.rows(), baselined_scores(options, e, responses, std::move(totals)));
  e.returns = widen(e, e.advantages);
}

void compute_advantages(const PpoOptions& options, std::span<const ScoredResponse> responses,
                        std::span<const double> placed_scores, Experience& e) {
  switch (options.advantage.form) {
    case AdvantageForm::kGae:
      return gae_advantages(options, responses, e);
    case AdvantageForm::kRewardToGo:
      e.returns = compute_reward_to_go(options.advantage.gae.gamma, options.advantage.gae.mask,
                                       e.value_rows(), e.token_rewards);
      e.advantages = narrow(e, e.returns);
      return;
    case AdvantageForm::kSequence:
      return sequence_advantages(options, responses, placed_scores, e);
    case AdvantageForm::kTokenBaseline:
    case AdvantageForm::kTokenBaselineByNumber:
      return token_baseline_advantages(options, responses, e);
  }
  fail<InternalError>("compute_experience: unknown advantage form");
}

void correct(const PpoOptions& options, std::span<const ScoredResponse> responses, Experience& e) {
  std::vector<double> old_log_probs;
  for (const ScoredResponse& r : responses) append(old_log_probs, r.log_probs);
  if (e.rollout_log_probs.empty()) return;
  RolloutCorrectionResult corrected =
      correct_rollout(options.correction, {e.rows(), old_log_probs, e.rollout_log_probs});
  for (const auto& [name, value] : corrected.metrics) e.metrics["rollout_corr/" + name] = value;
  if (options.correction.level != CorrectionLevel::kOff && !options.correction.bypass) {
    e.importance_weights = std::move(corrected.weights);
  }
  if (!options.correction.rejection.empty()) {
    RLHF_CHECK(std::find(corrected.mask.begin(), corrected.mask.end(), 1) != corrected.mask.end(),
               "rollout correction: the rejection rules ", options.correction.rejection,
               " dropped every token");
    e.mask = std::move(corrected.mask);
  }
}

void measure_batch(const PpoOptions& options, double kl_coefficient,
                   std::span<const ScoredResponse> responses, std::span<const double> kl, Experience& e) {
  const auto batch = static_cast<double>(responses.size());
  double score = 0;
  double raw_score = 0;
  double ended = 0;
  double truncated = 0;
  double total_kl = 0;
  for (std::size_t row = 0; row < responses.size(); ++row) {
    score += e.scores[row] / batch;
    raw_score += responses[row].score / batch;
    ended += responses[row].ended / batch;
    truncated += responses[row].truncated / batch;
    total_kl += row_sum(e.rows(), row, kl) / batch;
  }
  e.mean_kl = total_kl;
  const bool in_reward = options.kl.placement != KlRewardPlacement::kNone;
  const double penalty = in_reward ? -std::max(kl_coefficient, 0.0) * total_kl : 0.0;
  e.metrics["objective/kl"] = total_kl;
  e.metrics["objective/kl_coefficient"] = kl_coefficient;
  e.metrics["objective/scores"] = raw_score;
  e.metrics["objective/shaped_scores"] = score;
  e.metrics["objective/non_score_reward"] = penalty;
  e.metrics["objective/rlhf_reward"] = score + penalty;
  e.metrics["response/ended_fraction"] = ended;
  e.metrics["response/truncated_fraction"] = truncated;
  e.metrics["response/tokens_mean"] = static_cast<double>(e.offsets.back()) / batch;
  std::vector<double> squares(e.advantages.size());
  double largest = 0;
  for (std::size_t t = 0; t < squares.size(); ++t) {
    squares[t] = e.advantages[t] * e.advantages[t];
    if (e.mask[t]) largest = std::max(largest, std::abs(e.advantages[t]));
  }
  const double mean = masked_mean(e.rows(), e.advantages);
  e.metrics["advantage/mean"] = mean;
  e.metrics["advantage/std"] = std::sqrt(std::max(masked_mean(e.rows(), squares) - mean * mean, 0.0));
  e.metrics["advantage/abs_max"] = largest;
  std::vector<std::uint64_t> groups;
  std::vector<double> raw;
  for (const ScoredResponse& r : responses) {
    groups.push_back(r.group);
    raw.push_back(r.score);
  }
  double without_spread = 0;
  for (const std::uint8_t keep : groups_with_spread(raw, groups)) without_spread += !keep;
  e.metrics["group/without_spread_fraction"] = without_spread / batch;
}

}  // namespace

bool has_counting_token(const PpoOptions& options, const ScoredResponse& response) {
  if (response.unscored || (options.reward.mask_truncated && response.truncated)) return false;
  if (response.mask.empty()) return !response.log_probs.empty();
  return std::ranges::find(response.mask, 1) != response.mask.end();
}

Experience compute_experience(const PpoOptions& options, double kl_coefficient,
                              std::span<const ScoredResponse> responses) {
  RLHF_CHECK(!responses.empty(), "experience: no responses");
  Experience e = lay_out(options, responses);
  const std::vector<double> kl = token_kl(options.kl.estimator, responses);
  measure_kl_clamp(options, responses, e);
  const double coefficient = std::max(kl_coefficient, 0.0);

  e.scores = shaped_scores(options, responses, e);
  std::vector<double> placed = e.scores;
  if (options.kl.placement == KlRewardPlacement::kSequence) {
    for (std::size_t row = 0; row < placed.size(); ++row)
      placed[row] -= coefficient * row_sum(e.rows(), row, kl);
  }
  // The sequence form takes its baseline over the summed token rewards instead.
  if (options.advantage.form != AdvantageForm::kSequence) {
    placed = baselined_scores(options, e, responses, std::move(placed));
  }
  e.token_rewards.assign(e.value_offsets.back(), 0.0);
  if (options.kl.placement == KlRewardPlacement::kToken) {
    e.token_rewards = widen(e, kl);
    for (std::size_t t = 0; t < e.token_rewards.size(); ++t)
      e.token_rewards[t] *= -coefficient * e.value_mask[t];
  }
  place_scores(options, placed, e);
  add_step_rewards(responses, e);
  if (options.reward.whiten) whiten_rewards(e);

  correct(options, responses, e);
  compute_advantages(options, responses, placed, e);
  e.advantages = whiten(options.advantage.whitening, MeanHandling::kRemove, e.rows(), e.advantages);
  zero_masked(e.rows(), e.advantages);
  distil(options, responses, e);
  measure_batch(options, kl_coefficient, responses, kl, e);
  return e;
}

}  // namespace rlhf::ppo

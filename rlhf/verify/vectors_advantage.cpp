// Reward, advantage, whitening and control vectors.

#include <algorithm>
#include <cmath>
#include <map>

#include "rlhf/core/error.h"
#include "rlhf/ppo/experience.h"
#include "rlhf/ppo/kl.h"
#include "rlhf/verify/golden_case.h"
#include "rlhf/verify/trl_options.h"

namespace rlhf::verify {
namespace {

using namespace rlhf::ppo;

KlEstimatorOptions verl_estimator(std::string name) {
  KlEstimatorOptions options;
  if (!name.empty() && name.back() == '+') {
    options.gradient = KlGradient::kK2;
    name.pop_back();
  }
  static const std::map<std::string, KlEstimator> kNames = {
      {"kl", KlEstimator::kK1},  {"k1", KlEstimator::kK1}, {"abs", KlEstimator::kAbs},
      {"mse", KlEstimator::kK2}, {"k2", KlEstimator::kK2}, {"low_var_kl", KlEstimator::kK3},
      {"k3", KlEstimator::kK3}};
  const auto it = kNames.find(name);
  RLHF_CHECK(it != kNames.end(), "KL estimator '", name, "' is not known");
  options.estimator = it->second;
  if (options.estimator == KlEstimator::kK3) options.clamp = 10;
  return options;
}

KlEstimatorOptions openrlhf_estimator(GoldenCase& golden) {
  static const std::map<std::string, KlEstimator> kNames = {
      {"k1", KlEstimator::kK1}, {"k2", KlEstimator::kK2}, {"k3", KlEstimator::kK3}};
  const std::string name = golden.text("kl_estimator");
  const auto it = kNames.find(name);
  RLHF_CHECK(it != kNames.end(), "KL estimator '", name, "' is not known");
  KlEstimatorOptions options{it->second, KlGradient::kOwn, 10};
  if (golden.flag("unbiased_gradient")) options.gradient = KlGradient::kWeightedK2;
  return options;
}

std::vector<std::uint64_t> read_groups(GoldenCase& golden) {
  std::map<std::string, std::uint64_t> ids;
  std::vector<std::uint64_t> groups;
  for (const auto& label : golden.raw_input("group"))
    groups.push_back(ids.emplace(label.dump(), ids.size()).first->second);
  return groups;
}

std::vector<double> row_totals(const Tensor& matrix) {
  std::vector<double> totals(matrix.shape.at(0));
  for (std::size_t row = 0; row < totals.size(); ++row) {
    for (const double value : matrix.row(row)) totals[row] += value;
  }
  return totals;
}

}  // namespace

void check_kl(GoldenCase& golden, const nlohmann::json& source) {
  const bool verl = package_of(source) == "verl";
  RLHF_CHECK(verl || package_of(source) == "openrlhf", "package '", package_of(source), "' is not known");
  const KlEstimatorOptions options =
      verl ? verl_estimator(golden.text("kl_penalty")) : openrlhf_estimator(golden);
  const std::vector<double> policy = golden.values(verl ? "logprob" : "log_probs");
  const std::vector<double> reference = golden.values(verl ? "ref_logprob" : "log_probs_base");
  const std::vector<double> old = golden.optional_values("log_probs_old").value_or(policy);
  std::vector<double> kl;
  std::vector<double> gradient;
  for (std::size_t i = 0; i < policy.size(); ++i) {
    const ValueAndGradient term = estimate_kl(options, {policy[i], reference.at(i), old.at(i)});
    kl.push_back(term.value);
    gradient.push_back(term.gradient);
  }
  // OpenRLHF casts to float32 first.
  const Tolerance tolerance = verl ? golden.tolerance() : Tolerance{1e-5, 1e-6};
  golden.check("kl", kl, tolerance);
  golden.check("dkl_dlogprob", gradient, tolerance);
}

void check_gae(GoldenCase& golden, const nlohmann::json& source) {
  const bool verl = package_of(source) == "verl";
  RLHF_CHECK(verl || package_of(source) == "openrlhf", "package '", package_of(source), "' is not known");
  const MatrixRows rows = matrix_rows(golden.input(verl ? "response_mask" : "action_mask"));
  const std::vector<double> rewards = golden.values(verl ? "token_level_rewards" : "rewards");
  GaeOptions options;
  options.gamma = golden.number("gamma");
  options.mask = verl ? MaskHandling::kCarry : MaskHandling::kZero;
  if (!golden.has_input("values")) {
    golden.check("returns", compute_reward_to_go(options.gamma, options.mask, rows.view(), rewards));
    return;
  }
  options.lambda = golden.number(verl ? "lam" : "lambd");
  const std::vector<double> values = golden.values("values");
  AdvantagesAndReturns gae = compute_gae(options, {rows.view(), rewards, values, {}});
  if (verl) {
    gae.advantages = whiten(Whitening::kBesselShifted, MeanHandling::kRemove, rows.view(), gae.advantages);
  }
  golden.check("advantages", gae.advantages);
  golden.check("returns", gae.returns);
}

void check_token_reward(GoldenCase& golden, const nlohmann::json& source) {
  if (package_of(source) == "openrlhf") {
    const MatrixRows rows = matrix_rows(golden.input("action_mask"));
    ScoreOptions score;
    if (const auto range = golden.optional_range("reward_clip_range")) {
      score.clip_min = range->first;
      score.clip_max = range->second;
    }
    const std::vector<double> scores = shape_scores(score, golden.values("reward"), {});
    const std::vector<double> kl = golden.values("kl");
    golden.check("token_reward", compute_token_rewards({rows.view(), scores, kl, golden.number("kl_coef")}));
    return;
  }
  RLHF_CHECK(package_of(source) == "verl", "package '", package_of(source), "' is not known");
  const MatrixRows rows = matrix_rows(golden.input("response_mask"));
  const KlEstimatorOptions estimator = verl_estimator(golden.text("kl_penalty"));
  const std::vector<double> policy = golden.values("old_log_probs");
  const std::vector<double> reference = golden.values("ref_log_prob");
  std::vector<double> kl(policy.size());
  for (std::size_t t = 0; t < kl.size(); ++t) {
    if (rows.mask[t]) kl[t] = estimate_kl(estimator, {policy[t], reference.at(t), policy[t]}).value;
  }
  // Scores come as a matrix already: the KL part is what compute_token_rewards adds.
  const std::vector<double> no_scores(rows.view().rows(), 0.0);
  KlControllerOptions control{KlControllerKind::kFixed, golden.number("target"), golden.number("horizon")};
  const std::string kind = golden.text("controller");
  RLHF_CHECK(kind == "fixed" || kind == "adaptive", "KL controller '", kind, "' is not known");
  if (kind == "adaptive") control.kind = KlControllerKind::kAdaptive;
  KlController controller(control, golden.number("coef_before"));
  std::vector<double> rewards = compute_token_rewards({rows.view(), no_scores, kl, controller.coefficient()});
  const std::vector<double> scores = golden.values("token_level_scores");
  for (std::size_t t = 0; t < rewards.size(); ++t) rewards[t] += scores.at(t);
  double mean_kl = 0;
  for (std::size_t row = 0; row < rows.view().rows(); ++row) {
    const auto tokens = static_cast<double>(count_tokens(rows.view(), row));
    mean_kl += row_sum(rows.view(), row, kl) / (tokens + 1e-8) / static_cast<double>(rows.view().rows());
  }
  controller.update(mean_kl, rows.view().rows());
  golden.check("token_level_rewards", rewards);
  golden.check("mean_kl", mean_kl, golden.at_least(1e-7));
  golden.check("coef_after", controller.coefficient(), golden.at_least(1e-7));
}

void check_whiten(GoldenCase& golden, const nlohmann::json& source) {
  const bool verl = package_of(source) == "verl";
  RLHF_CHECK(verl || package_of(source) == "trl", "package '", package_of(source), "' is not known");
  const MatrixRows rows = matrix_rows(golden.input("mask"));
  const std::vector<double> values = golden.values("values");
  const Whitening kind = verl ? Whitening::kBesselShifted : Whitening::kBessel;
  const MeanHandling mean = golden.flag("shift_mean") ? MeanHandling::kRemove : MeanHandling::kKeep;
  const Moments moments = masked_moments(kind, rows.view(), values);
  golden.check("whitened", whiten(kind, mean, rows.view(), values));
  golden.check("mean", moments.mean);
  golden.check("var", moments.variance);
}

namespace {

struct StageBatch {
  std::vector<ScoredResponse> responses;                    // in the order of the chunks
  std::vector<std::pair<std::size_t, std::size_t>> chunks;  // rows and width of each chunk
  std::vector<Tensor> masks;
};

StageBatch read_stage(GoldenCase& golden, std::size_t samples_per_prompt) {
  static const std::set<std::string> kKnown = {"index",  "action_mask",     "rewards",  "kl",
                                               "values", "response_length", "truncated"};
  StageBatch batch;
  for (const auto& chunk : golden.raw_input("chunks")) {
    for (const auto& [key, value] : chunk.items()) {
      RLHF_CHECK(kKnown.contains(key), "input 'chunks.", key, "' is not known");
    }
    const Tensor mask = read_tensor(chunk.at("action_mask"));
    const Tensor kl = read_tensor(chunk.at("kl"));
    const Tensor index = read_tensor(chunk.at("index"));
    const Tensor rewards = read_tensor(chunk.at("rewards"));
    const Tensor lengths = read_tensor(chunk.at("response_length"));
    const bool has_values = chunk.contains("values") && !chunk["values"].is_null();
    const Tensor values = has_values ? read_tensor(chunk["values"]) : Tensor{};
    const bool has_truncated = chunk.contains("truncated") && !chunk["truncated"].is_null();
    const Tensor truncated = has_truncated ? read_tensor(chunk["truncated"]) : Tensor{};
    for (std::size_t row = 0; row < mask.shape.at(0); ++row) {
      ScoredResponse r;
      for (const double bit : mask.row(row)) r.mask.push_back(bit != 0);
      // The package is given the KL itself: a reference at -kl beside a policy at 0 gives exactly that.
      r.log_probs.assign(r.mask.size(), 0.0);
      for (const double value : kl.row(row)) r.reference_log_probs.push_back(-value);
      if (has_values) r.values.assign(values.row(row).begin(), values.row(row).end());
      r.score = rewards.values.at(row);
      r.truncated = has_truncated && truncated.values.at(row) != 0;
      r.group = static_cast<std::uint64_t>(index.values.at(row)) / samples_per_prompt;
      // The package's length is a number of its own; rows are as wide as the matrix.
      r.bootstrap_value = 0;
      batch.responses.push_back(std::move(r));
    }
    batch.masks.push_back(lengths);
    batch.chunks.emplace_back(mask.shape[0], mask.shape.at(1));
  }
  return batch;
}

PpoOptions openrlhf_stage_options(GoldenCase& golden) {
  PpoOptions options;
  const std::string estimator = golden.text("estimator");
  options.advantage.form = estimator == "gae" ? AdvantageForm::kGae : AdvantageForm::kRewardToGo;
  options.advantage.gae = {golden.number("gamma"), golden.number("lambd"), MaskHandling::kZero, 0};
  const Whitening normal = golden.flag("no_std_norm") ? Whitening::kCentre : Whitening::kBiased;
  options.advantage.whitening = Whitening::kNone;
  GroupOptions& group = options.advantage.group;
  group = {GroupBaseline::kNone, GroupScale::kNone};
  if (estimator == "gae" || estimator == "reinforce") {
    options.advantage.whitening = normal;
  } else if (estimator == "rloo") {
    group.baseline = GroupBaseline::kLeaveOneOut;
  } else if (estimator == "reinforce_baseline") {
    group.baseline = GroupBaseline::kMean;
    options.advantage.whitening = normal;
  } else if (estimator == "dr_grpo") {
    group.baseline = GroupBaseline::kMean;
  } else if (estimator == "group_norm") {
    group = {GroupBaseline::kMean, GroupScale::kGroup, 1e-9};
  } else if (estimator == "flash_reinforce") {
    group.baseline = GroupBaseline::kBatchMean;
  } else {
    fail<InvalidArgument>("estimator '", estimator, "' is not known");
  }
  options.kl.placement = KlRewardPlacement::kToken;
  options.reward.clip_stage = ScoreClipStage::kAfterBaseline;
  if (const auto range = golden.optional_range("reward_clip_range")) {
    options.reward.score.clip_min = range->first;
    options.reward.score.clip_max = range->second;
  }
  options.reward.length.max_response_tokens = static_cast<std::size_t>(golden.number("max_new_tokens"));
  options.reward.length.overlong_buffer = static_cast<std::size_t>(golden.number("overlong_buffer_len", 0));
  options.reward.length.overlong_factor = golden.number("overlong_penalty_factor", 1);
  options.reward.length.truncated_score = golden.optional_number("stop_properly_penalty_coef");
  return options;
}

void compare_chunks(GoldenCase& golden, const StageBatch& batch, const Experience& e, double coefficient,
                    std::span<const double> shaped, std::span<const double> advantages) {
  const nlohmann::json& chunks = golden.output("chunks");
  std::size_t row = 0;
  for (std::size_t c = 0; c < batch.chunks.size(); ++c) {
    const auto [rows, width] = batch.chunks[c];
    std::map<std::string, std::vector<double>> actual;
    for (std::size_t i = row; i < row + rows; ++i) {
      double total = 0;
      for (std::size_t t = e.offsets[i]; t < e.offsets[i + 1]; ++t) {
        actual["advantages"].push_back(advantages[t]);
        actual["returns"].push_back(e.returns[t]);
        // The package's sum includes the KL under the mask, which trains nothing.
        total += e.token_rewards[t] + (e.mask[t] ? 0.0 : coefficient * e.reference_log_probs[t]);
      }
      actual["shaped_rewards"].push_back(shaped[i]);
      actual["token_reward_sum"].push_back(total);
    }
    row += rows;
    for (const auto& [key, expected] : chunks.at(c).items()) {
      if (!actual.contains(key)) {
        golden.fail_with("output 'chunks." + key + "' is not known");
        continue;
      }
      golden.compare(concat("chunks[", c, "].", key), actual[key], read_tensor(expected).values,
                     golden.tolerance());
    }
  }
}

}  // namespace

void check_advantage_stage(GoldenCase& golden, const nlohmann::json& source) {
  RLHF_CHECK(package_of(source) == "openrlhf", "package '", package_of(source), "' is not known");
  PpoOptions options = openrlhf_stage_options(golden);
  const auto samples = static_cast<std::size_t>(golden.number("n_samples_per_prompt"));
  const StageBatch batch = read_stage(golden, samples);
  const double coefficient = golden.number("kl_coef");
  options.kl.coefficient = coefficient;
  // Length rules use the package's response_length, which is not the width of the matrix.
  std::vector<double> scores;
  std::vector<std::size_t> lengths;
  std::vector<std::uint8_t> truncated;
  for (const Tensor& chunk : batch.masks) {
    for (const double length : chunk.values) lengths.push_back(static_cast<std::size_t>(length));
  }
  for (const ScoredResponse& r : batch.responses) {
    scores.push_back(r.score);
    truncated.push_back(r.truncated);
  }
  const std::vector<double> shaped = shape_by_length(options.reward.length, {scores, lengths, truncated});
  std::vector<ScoredResponse> responses = batch.responses;
  for (std::size_t i = 0; i < responses.size(); ++i) responses[i].score = shaped[i];
  options.reward.length = {};
  const Whitening whitening = options.advantage.whitening;
  options.advantage.whitening = Whitening::kNone;
  const Experience e = compute_experience(options, coefficient, responses);
  // compute_experience clears what the mask hides; the package whitens it along with the rest.
  const std::vector<double> raw =
      options.advantage.form == AdvantageForm::kGae
          ? compute_gae(options.advantage.gae, {e.rows(), e.token_rewards, e.old_values, {}}).advantages
          : e.returns;
  compare_chunks(golden, batch, e, std::max(coefficient, 0.0), shaped,
                 whiten(whitening, MeanHandling::kRemove, e.rows(), raw));
}

namespace {

void check_trl_groups(GoldenCase& golden) {
  TrlRewards rewards;
  rewards.trainer = golden.text("trainer");
  rewards.terms = trl_reward_terms(golden, golden.input("rewards_per_function"));
  rewards.sequence_kl = golden.optional_values("sequence_kl").value_or(std::vector<double>{});
  golden.ignore_param("beta");  // GRPO's KL is in the loss, RLOO reads the weight itself
  golden.check("advantages", trl_response_advantages(golden, rewards));
}

GroupOptions verl_group_options(GoldenCase& golden, const std::string& estimator) {
  const bool by_deviation = estimator.rfind("grpo", 0) == 0 && golden.flag("norm_adv_by_std_in_grpo", true);
  GroupOptions options{GroupBaseline::kMean, by_deviation ? GroupScale::kGroup : GroupScale::kNone,
                       golden.number("epsilon", 1e-6)};
  if (estimator == "grpo_vectorized") options.precision = GroupPrecision::kSingle;
  if (estimator == "grpo_passk") options.baseline = GroupBaseline::kBestOfGroup;
  if (estimator.rfind("rloo", 0) == 0) options.baseline = GroupBaseline::kLeaveOneOut;
  if (estimator == "rloo_vectorized") options.singletons = SingletonGroups::kZero;
  if (estimator == "opo") options.baseline = GroupBaseline::kLengthWeighted;
  if (estimator == "gpg") options.scale = GroupScale::kNonZeroShare;
  return options;
}

void check_token_baseline(GoldenCase& golden, const std::string& estimator, const MatrixRows& rows) {
  const std::vector<double> rewards = golden.values("token_level_rewards");
  const std::vector<std::uint64_t> groups = read_groups(golden);
  const std::vector<double> old_log_probs = golden.values("old_log_probs");
  const std::vector<double> squares = golden.values("sum_pi_squared");
  const std::vector<double> weights =
      golden.optional_values("rollout_is_weights").value_or(std::vector<double>{});
  TokenBaselineInputs inputs{rows.view(), rewards, groups, old_log_probs, squares, weights};
  inputs.alignment =
      estimator == "optimal_token_baseline" ? TokenAlignment::kPosition : TokenAlignment::kTokenNumber;
  inputs.tail = golden.flag("handle_zero_tail", true) ? LoneTail::kNoBaseline : LoneTail::kOwnBaseline;
  const TokenBaselineResult result = optimal_token_baseline(inputs);
  golden.check("advantages", result.advantages);
  golden.check("returns", result.returns);
}

void check_verl_groups(GoldenCase& golden) {
  static const std::set<std::string> kGroup = {"grpo",
                                               "grpo_vectorized",
                                               "grpo_passk",
                                               "rloo",
                                               "rloo_vectorized",
                                               "opo",
                                               "gpg",
                                               "reinforce_plus_plus_baseline"};
  const std::string estimator = golden.text("estimator");
  const MatrixRows rows = matrix_rows(golden.input("response_mask"));
  if (estimator == "optimal_token_baseline" || estimator == "tir_optimal_token_baseline") {
    return check_token_baseline(golden, estimator, rows);
  }
  const Tensor rewards = golden.input("token_level_rewards");
  const std::vector<std::uint64_t> groups = read_groups(golden);
  std::vector<double> advantages;
  std::vector<double> returns;
  if (estimator == "reinforce_plus_plus") {
    returns = compute_reward_to_go(golden.number("gamma"), MaskHandling::kCarry, rows.view(), rewards.values);
    advantages = whiten(Whitening::kBesselShifted, MeanHandling::kRemove, rows.view(), returns);
    zero_masked(rows.view(), advantages);
  } else if (estimator == "remax") {
    returns = compute_reward_to_go(1, MaskHandling::kZero, rows.view(), rewards.values);
    advantages = returns;
    const std::vector<double> baselines = spread_over_tokens(rows.view(), golden.values("reward_baselines"));
    for (std::size_t t = 0; t < advantages.size(); ++t) advantages[t] -= baselines[t];
  } else {
    RLHF_CHECK(kGroup.contains(estimator), "estimator '", estimator, "' is not known");
    std::vector<double> lengths;
    for (std::size_t row = 0; row < rows.view().rows(); ++row) {
      lengths.push_back(static_cast<double>(count_tokens(rows.view(), row)));
    }
    advantages = spread_over_tokens(rows.view(), group_advantages(verl_group_options(golden, estimator),
                                                                  {row_totals(rewards), groups, lengths}));
    if (estimator == "reinforce_plus_plus_baseline") {
      advantages = whiten(Whitening::kBesselShifted, MeanHandling::kRemove, rows.view(), advantages);
      zero_masked(rows.view(), advantages);
    }
    returns = advantages;
  }
  // Float32 constants inside: 1 + 1e-6 of singleton groups, the ratio of gpg; all of grpo_vectorized.
  Tolerance tolerance = golden.tolerance();
  if (estimator == "grpo" || estimator == "gpg" || estimator == "grpo_passk")
    tolerance = golden.at_least(2e-7);
  if (estimator == "grpo_vectorized") tolerance = golden.at_least(1e-5);
  golden.check("advantages", advantages, tolerance);
  golden.check("returns", returns, tolerance);
}

}  // namespace

void check_group_advantage(GoldenCase& golden, const nlohmann::json& source) {
  if (package_of(source) == "trl") return check_trl_groups(golden);
  RLHF_CHECK(package_of(source) == "verl", "package '", package_of(source), "' is not known");
  check_verl_groups(golden);
}

namespace {

void check_overlong(GoldenCase& golden) {
  const std::vector<double> scores = golden.values("score");
  std::vector<std::size_t> lengths;
  for (const double length : golden.values("response_length"))
    lengths.push_back(static_cast<std::size_t>(length));
  LengthShapingOptions options;
  options.max_response_tokens = static_cast<std::size_t>(golden.number("max_new_tokens"));
  options.overlong_buffer = static_cast<std::size_t>(golden.number("buffer_len"));
  options.overlong_factor = golden.number("penalty_factor");
  golden.check("shaped_score_openrlhf", shape_by_length(options, {scores, lengths, {}}));
  options.overlong_capped = false;
  const std::vector<double> shaped = shape_by_length(options, {scores, lengths, {}});
  golden.check("shaped_score_verl", shaped);
  MatrixRows rows;
  rows.offsets.push_back(0);
  for (const std::size_t length : lengths) {
    rows.offsets.push_back(rows.offsets.back() + options.max_response_tokens);
    for (std::size_t t = 0; t < options.max_response_tokens; ++t) rows.mask.push_back(t < length);
  }
  golden.check("token_reward_verl", compute_token_rewards({rows.view(), shaped, {}}));
}

void check_adaptive_kl(GoldenCase& golden) {
  KlControllerOptions options{KlControllerKind::kAdaptive, golden.number("target"), golden.number("horizon")};
  KlController controller(options, golden.number("init_coef"));
  std::vector<double> coefficients;
  for (const double kl : golden.values("current_kl")) {
    controller.update(kl, static_cast<std::size_t>(golden.number("n_steps")));
    coefficients.push_back(controller.coefficient());
  }
  golden.check("coef_verl", coefficients);
  golden.check("coef_openrlhf", coefficients);
}

}  // namespace

void check_shaping_control(GoldenCase& golden, const nlohmann::json&) {
  if (golden.has_input("current_kl")) return check_adaptive_kl(golden);
  if (golden.has_input("response_length")) return check_overlong(golden);
  RLHF_CHECK(golden.has_input("truncated"), "this kind of shaping is not known");
  std::vector<std::uint8_t> truncated;
  for (const double flag : golden.values("truncated")) truncated.push_back(flag != 0);
  LengthShapingOptions options;
  options.truncated_score = golden.number("coef");
  golden.check("shaped_score_openrlhf", shape_by_length(options, {golden.values("score"), {}, truncated}));
}

}  // namespace rlhf::verify

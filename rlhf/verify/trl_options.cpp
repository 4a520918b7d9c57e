#include "rlhf/verify/trl_options.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <map>
#include <set>

#include "rlhf/core/error.h"
#include "rlhf/ppo/token_reward.h"

namespace rlhf::verify {

using namespace rlhf::ppo;

namespace {

constexpr double kDeviationEpsilon = 1e-4;

// TRL's bounds are numbers of the ratio for cispo (upper only), distances from 1 otherwise.
void set_clip(GoldenCase& golden, PolicyLossOptions& o) {
  const bool own_lower = golden.has_param("epsilon_low");
  o.clip_low = golden.number(own_lower ? "epsilon_low" : "epsilon");
  o.clip_high = golden.number("epsilon_high", o.clip_low);
  if (o.objective != PolicyObjective::kCispo) return;
  o.clip_low = 1;
  o.clip_high -= 1;
}

// Responses that are alone among the scored ones of their prompt have no advantage of their own.
void drop_unscored(std::span<const double> scores, std::span<const std::uint64_t> groups,
                   std::span<double> advantages) {
  std::map<std::uint64_t, std::size_t> present;
  for (std::size_t i = 0; i < scores.size(); ++i) present[groups[i]] += !std::isnan(scores[i]);
  for (std::size_t i = 0; i < scores.size(); ++i)
    if (std::isnan(scores[i]) || present[groups[i]] < 2) advantages[i] = std::nan("");
}

std::vector<double> grpo_advantages(GoldenCase& golden, const TrlRewards& rewards) {
  const std::string aggregation = golden.text("multi_objective_aggregation");
  RLHF_CHECK(aggregation == "sum_then_normalize" || aggregation == "normalize_then_sum",
             "multi_objective_aggregation '", aggregation, "' is not known");
  const bool sum_first = aggregation == "sum_then_normalize";
  GroupOptions options = trl_group_options(golden, "grpo");
  // The terms are always scaled by their group's deviation when they are normalised first.
  if (!sum_first) options.scale = GroupScale::kGroup;
  return multi_objective_advantages(
      options, sum_first ? ObjectiveAggregation::kSumThenNormalize : ObjectiveAggregation::kNormalizeThenSum,
      rewards.terms, trl_groups(golden, rewards.terms.terms.at(0).size()));
}

std::vector<double> rloo_advantages(GoldenCase& golden, const TrlRewards& rewards) {
  std::vector<double> scores = combine_terms(rewards.terms);
  const ScoreOptions clip = trl_score_options(golden);
  const double beta = golden.number("beta", 0);
  for (std::size_t i = 0; i < scores.size(); ++i) {
    if (std::isnan(scores[i])) continue;
    scores[i] = shape_scores(clip, std::span(&scores[i], 1), {})[0];
    if (!rewards.sequence_kl.empty()) scores[i] -= beta * rewards.sequence_kl.at(i);
  }
  const std::vector<std::uint64_t> groups = trl_groups(golden, scores.size());
  std::vector<double> advantages = group_advantages(trl_group_options(golden, "rloo"), {scores, groups, {}});
  if (!golden.flag("normalize_advantages")) return advantages;
  drop_unscored(scores, groups, advantages);
  return normalize_scores(advantages, kDeviationEpsilon);
}

}  // namespace

TrlLossType trl_loss_type(const std::string& name) {
  static const std::map<std::string, TrlLossType> kTypes = {
      {"grpo", {PolicyObjective::kClip, Aggregation::kSequenceMeanTokenMean, false}},
      {"sapo", {PolicyObjective::kSapo, Aggregation::kSequenceMeanTokenMean, false}},
      {"bnpo", {PolicyObjective::kClip, Aggregation::kTokenMean, false}},
      {"dr_grpo", {PolicyObjective::kClip, Aggregation::kConstant, false}},
      {"dapo", {PolicyObjective::kClip, Aggregation::kTokenMean, true}},
      {"cispo", {PolicyObjective::kCispo, Aggregation::kTokenMean, true}},
      {"vespo", {PolicyObjective::kVespo, Aggregation::kTokenMean, true}},
      {"luspo", {PolicyObjective::kClip, Aggregation::kConstant, false}}};
  const auto it = kTypes.find(name);
  RLHF_CHECK(it != kTypes.end(), "loss_type '", name, "' is not known");
  return it->second;
}

PolicyLossOptions trl_policy_options(GoldenCase& golden, const TrlLossType& type) {
  PolicyLossOptions o;
  o.objective = type.objective;
  const std::string level = golden.text("importance_sampling_level");
  RLHF_CHECK(level == "token" || level == "sequence", "importance_sampling_level '", level, "' is not known");
  if (level == "sequence") o.ratio_level = RatioLevel::kSequenceMean;
  set_clip(golden, o);
  o.ratio_cap = type.objective == PolicyObjective::kClip ? golden.number("delta", 0) : 0;
  golden.ignore_param("delta");
  o.sapo_tau_positive = golden.number("sapo_temperature_pos", 1.0);
  o.sapo_tau_negative = golden.number("sapo_temperature_neg", 1.05);
  o.vespo = {golden.number("vespo_k_pos", 2), golden.number("vespo_lambda_pos", 3),
             golden.number("vespo_k_neg", 3), golden.number("vespo_lambda_neg", 2)};
  o.aggregation = {type.aggregation, golden.number("max_completion_length", 0), 0};
  if (golden.text("loss_type") == "luspo") o.aggregation.scale = 1;
  o.kl.coefficient = golden.number("beta", 0);
  o.kl.estimator.estimator = KlEstimator::kK3;
  o.kl.ratio_weighted = golden.flag("use_bias_correction_kl");
  o.entropy_coefficient = golden.number("entropy_coef", 0);
  o.entropy_aggregation = EntropyAggregation::kTokenMean;
  o.top_entropy_quantile = golden.number("top_entropy_quantile", 1);
  o.off_policy_threshold = golden.optional_number("off_policy_mask_threshold");
  return o;
}

AggregationContext trl_loss_context(const TrlLossType& type, const TrlMicroBatch& batch) {
  AggregationContext context;
  context.micro_batches = batch.accumulation;
  // TRL's mean over responses includes those of which no token counts.
  context.total_sequences = batch.rows;
  // The count covers a generation batch: its share of one micro-batch, times micro_batches, is the step's.
  if (type.global_tokens) context.total_tokens = std::max(batch.tokens, 1.0) / batch.steps_per_generation;
  return context;
}

RewardTerms trl_reward_terms(GoldenCase& golden, const Tensor& rewards) {
  RLHF_CHECK(rewards.shape.size() == 2, "rewards must be a matrix of responses and functions");
  RewardTerms terms;
  terms.terms.resize(rewards.shape[1]);
  for (std::size_t row = 0; row < rewards.shape[0]; ++row)
    for (std::size_t k = 0; k < terms.terms.size(); ++k) terms.terms[k].push_back(rewards.row(row)[k]);
  if (golden.has_param("reward_weights")) terms.weights = read_tensor(golden.param("reward_weights")).values;
  return terms;
}

std::vector<std::uint64_t> trl_groups(GoldenCase& golden, std::size_t responses) {
  const auto per_prompt = static_cast<std::size_t>(golden.number("num_generations"));
  RLHF_CHECK(per_prompt > 0 && responses % per_prompt == 0, responses,
             " responses do not fall into groups of ", per_prompt);
  std::vector<std::uint64_t> groups;
  for (std::size_t i = 0; i < responses; ++i) groups.push_back(i / per_prompt);
  return groups;
}

GroupOptions trl_group_options(GoldenCase& golden, const std::string& trainer) {
  if (trainer == "rloo") return {GroupBaseline::kLeaveOneOut, GroupScale::kNone, 0, SingletonGroups::kZero};
  RLHF_CHECK(trainer == "grpo", "trainer '", trainer, "' is not known");
  static const std::map<std::string, GroupScale> kScales = {
      {"group", GroupScale::kGroup}, {"batch", GroupScale::kBatch}, {"none", GroupScale::kNone}};
  const auto it = kScales.find(golden.text("scale_rewards"));
  RLHF_CHECK(it != kScales.end(), "scale_rewards '", golden.text("scale_rewards"), "' is not known");
  return {GroupBaseline::kMean, it->second, kDeviationEpsilon, SingletonGroups::kZero};
}

ScoreOptions trl_score_options(GoldenCase& golden) {
  ScoreOptions score;
  if (const auto range = golden.optional_range("reward_clip_range")) {
    score.clip_min = range->first;
    score.clip_max = range->second;
  }
  return score;
}

std::vector<double> trl_response_advantages(GoldenCase& golden, const TrlRewards& rewards) {
  if (rewards.trainer == "grpo") return grpo_advantages(golden, rewards);
  RLHF_CHECK(rewards.trainer == "rloo", "trainer '", rewards.trainer, "' is not known");
  return rloo_advantages(golden, rewards);
}

LrScheduleOptions lr_schedule_named(const std::string& name) {
  static const std::map<std::string, LrShape> kShapes = {
      {"constant", LrShape::kConstant},
      {"constant_with_warmup", LrShape::kConstant},
      {"linear", LrShape::kLinear},
      {"cosine", LrShape::kCosine},
      {"cosine_with_min_lr", LrShape::kCosine},
      {"cosine_with_restarts", LrShape::kCosineWithRestarts},
      {"polynomial", LrShape::kPolynomial},
      {"inverse_sqrt", LrShape::kInverseSqrt},
      {"warmup_stable_decay", LrShape::kWarmupStableDecay},
      {"verl_cosine", LrShape::kCosine},
      {"verl_cosine_init", LrShape::kCosine},
      {"verl_constant", LrShape::kConstant},
      {"verl_wsd", LrShape::kWarmupStableDecay}};
  const auto it = kShapes.find(name);
  RLHF_CHECK(it != kShapes.end(), "schedule '", name, "' is not known");
  LrScheduleOptions options;
  options.shape = it->second;
  options.cycles = options.shape == LrShape::kCosineWithRestarts ? 1.0 : 0.5;
  return options;
}

LrScheduleOptions trl_lr_schedule(GoldenCase& golden, double base_rate) {
  // Those that run without further arguments, which these records do not list.
  static const std::set<std::string> kPlain = {"constant",    "constant_with_warmup", "linear",
                                               "cosine",      "cosine_with_restarts", "polynomial",
                                               "inverse_sqrt"};
  std::string name = golden.text("lr_scheduler_type");
  if (const auto dot = name.rfind('.'); dot != std::string::npos) name = name.substr(dot + 1);
  std::transform(name.begin(), name.end(), name.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  RLHF_CHECK(kPlain.contains(name), "lr_scheduler_type '", golden.text("lr_scheduler_type"),
             "' is not known");
  LrScheduleOptions options = lr_schedule_named(name);
  if (options.shape == LrShape::kPolynomial) options.min_ratio = 1e-7 / base_rate;
  // transformers: a number below 1 is a share of all steps. Its plain constant schedule has no warmup.
  const double warmup = name == "constant" ? 0 : golden.number("warmup_steps", 0);
  golden.ignore_param("warmup_steps");
  if (warmup < 1)
    options.warmup_ratio = warmup;
  else
    options.warmup_steps = static_cast<std::size_t>(warmup);
  return options;
}

OptimizerOptions trl_optimizer(GoldenCase& golden) {
  OptimizerOptions o;
  o.learning_rate = golden.number("learning_rate");
  o.beta1 = golden.number("adam_beta1");
  o.beta2 = golden.number("adam_beta2");
  o.epsilon = golden.number("adam_epsilon");
  o.weight_decay = golden.number("weight_decay");
  RLHF_CHECK(o.weight_decay == 0, "weight_decay ", o.weight_decay,
             " is not known: TRL exempts norms and biases from it");
  o.max_grad_norm = golden.number("max_grad_norm", 0);
  o.schedule = trl_lr_schedule(golden, o.learning_rate);
  return o;
}

}  // namespace rlhf::verify

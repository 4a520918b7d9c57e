// Policy, value and aggregation losses, and the rollout correction.

#include <algorithm>
#include <cmath>
#include <map>

#include "rlhf/core/error.h"
#include "rlhf/ppo/policy_loss.h"
#include "rlhf/ppo/rollout_correction.h"
#include "rlhf/ppo/value_loss.h"
#include "rlhf/verify/golden_case.h"
#include "rlhf/verify/trl_options.h"

namespace rlhf::verify {
namespace {

using namespace rlhf::ppo;

constexpr double kLengthEpsilon = 1e-8;  // verl and OpenRLHF

AggregationOptions verl_aggregation(const std::string& mode, double scale) {
  static const std::map<std::string, Aggregation> kModes = {
      {"token-mean", Aggregation::kTokenMean},
      {"token-sum", Aggregation::kTokenSum},
      {"seq-mean-token-sum", Aggregation::kSequenceMeanTokenSum},
      {"seq-mean-token-mean", Aggregation::kSequenceMeanTokenMean},
      {"seq-mean-token-sum-norm", Aggregation::kSequenceMeanTokenSumNorm}};
  const auto it = kModes.find(mode);
  RLHF_CHECK(it != kModes.end(), "aggregation '", mode, "' is not known");
  return {it->second, scale, kLengthEpsilon};
}

// Totals of the global batch, from the parameters or an object among them.
struct Scope {
  AggregationContext context;
  double scale = 0;
};

Scope read_scope(const nlohmann::json& info) {
  Scope scope;
  for (const auto& [key, value] : info.items()) {
    if (value.is_null()) continue;
    if (key == "dp_size") {
      scope.context.data_parallel_size = value.get<double>();
    } else if (key == "batch_num_tokens") {
      scope.context.total_tokens = value.get<double>();
    } else if (key == "global_batch_size") {
      scope.context.total_sequences = value.get<double>();
    } else if (key == "loss_scale_factor") {
      scope.scale = value.get<double>();
    } else {
      fail<InvalidArgument>("global batch entry '", key, "' is not known");
    }
  }
  return scope;
}

Scope scope_params(GoldenCase& golden) {
  nlohmann::json info = nlohmann::json::object();
  for (const char* key : {"dp_size", "batch_num_tokens", "global_batch_size", "loss_scale_factor"}) {
    if (golden.has_param(key)) info[key] = golden.param(key);
  }
  return read_scope(info);
}

// Owns what PolicyLossInputs looks at.
struct LossArrays {
  MatrixRows rows;
  std::vector<double> log_probs, old_log_probs, advantages, weights, reference, entropies;

  PolicyLossInputs inputs() const {
    PolicyLossInputs in;
    in.rows = rows.view();
    in.log_probs = log_probs;
    in.old_log_probs = old_log_probs;
    in.advantages = advantages;
    in.importance_weights = weights;
    in.reference_log_probs = reference;
    in.entropies = entropies;
    return in;
  }
};

PolicyLossOptions verl_objective(GoldenCase& golden, const std::string& mode) {
  PolicyLossOptions o;
  const double clip = golden.number("clip_ratio", 0.2);
  o.clip_low = golden.number("clip_ratio_low", clip);
  o.clip_high = golden.number("clip_ratio_high", clip);
  const double c = golden.number("clip_ratio_c", 3.0);
  o.log_ratio_min = -20;
  o.log_ratio_max = 20;
  if (mode == "vanilla") {
    o.dual_clip = c;
  } else if (mode == "gspo") {
    o.ratio_level = RatioLevel::kSequenceMeanTokenGradient;
    o.log_ratio_min = std::nullopt;
    o.log_ratio_max = 10;
  } else if (mode == "cispo") {
    o.objective = PolicyObjective::kCispo;
  } else if (mode == "sapo") {
    o.objective = PolicyObjective::kSapo;
    o.sapo_tau_positive = golden.number("tau_pos", 1.0);
    o.sapo_tau_negative = golden.number("tau_neg", 1.05);
  } else if (mode == "gpg" || mode == "reinforce") {
    o.objective = PolicyObjective::kReinforce;
  } else if (mode == "dppo_tv" || mode == "dppo_kl") {
    o.objective = mode == "dppo_tv" ? PolicyObjective::kDppoTv : PolicyObjective::kDppoKl;
    o.dual_clip = golden.number("clip_ratio_c", 20.0);
  } else {
    // These do not bound the log-ratio.
    o.log_ratio_min = o.log_ratio_max = std::nullopt;
    if (mode == "geo_mean") {
      o.objective = PolicyObjective::kGeometricMean;
    } else if (mode == "dro") {
      o.objective = PolicyObjective::kDro;
      o.dro_beta = golden.number("dro_beta");
    } else if (mode == "clip_cov") {
      o.objective = PolicyObjective::kClipCov;
      o.covariance = {golden.number("clip_cov_ratio"), golden.number("clip_cov_lb"),
                      golden.number("clip_cov_ub"), 0};
    } else if (mode == "kl_cov") {
      o.objective = PolicyObjective::kKlCov;
      o.covariance = {golden.number("kl_cov_ratio"), 0, 0, golden.number("ppo_kl_coef")};
    } else {
      fail<InvalidArgument>("loss_mode '", mode, "' is not known");
    }
  }
  return o;
}

std::map<std::string, double> verl_metrics(const PolicyLossOptions& o, const PolicyLossMetrics& m) {
  std::map<std::string, double> metrics;
  // The bounded mean is what the bounded losses report; GSPO's one-sided bound does not enter its metric.
  metrics["actor/ppo_kl"] = o.log_ratio_min ? m.approx_kl_bounded : m.approx_kl;
  if (o.objective == PolicyObjective::kKlCov) metrics["actor/ppo_kl"] = m.absolute_log_ratio;
  if (o.objective == PolicyObjective::kReinforce) metrics["actor/ppo_kl"] = m.approx_kl;
  metrics["actor/pg_clipfrac"] = m.clip_fraction;
  metrics["actor/pg_clipfrac_lower"] = m.dual_clip_fraction;
  return metrics;
}

std::pair<std::optional<double>, double> read_band(const nlohmann::json& threshold) {
  if (threshold.is_number()) return {std::nullopt, threshold.get<double>()};
  const std::string text = threshold.get<std::string>();
  const auto bar = text.find('_');
  if (bar == std::string::npos) return {std::nullopt, std::stod(text)};
  return {std::stod(text.substr(0, bar)), std::stod(text.substr(bar + 1))};
}

RolloutCorrectionOptions verl_correction(GoldenCase& golden) {
  RolloutCorrectionOptions o;
  if (golden.has_param("rollout_is")) {
    const std::string level = golden.text("rollout_is");
    RLHF_CHECK(level == "token" || level == "sequence", "rollout_is '", level, "' is not known");
    o.level = level == "token" ? CorrectionLevel::kToken : CorrectionLevel::kSequenceProduct;
    if (golden.has_param("rollout_is_threshold")) {
      const auto [lower, upper] = read_band(golden.param("rollout_is_threshold"));
      o.mode = lower ? CorrectionMode::kMask : CorrectionMode::kTruncate;
      o.lower = lower.value_or(0);
      o.upper = upper;
    }
    o.batch_normalize = golden.flag("rollout_is_batch_normalize");
  }
  golden.ignore_param("rollout_is_threshold");
  golden.ignore_param("rollout_is_batch_normalize");
  if (golden.has_param("rollout_rs")) {
    o.rejection = golden.text("rollout_rs");
    const nlohmann::json& threshold = golden.param("rollout_rs_threshold");
    o.rejection_threshold = threshold.is_string() ? threshold.get<std::string>() : threshold.dump();
  }
  golden.ignore_param("rollout_rs_threshold");
  return o;
}

std::map<std::string, double> with_prefix(const std::map<std::string, double>& metrics) {
  std::map<std::string, double> prefixed;
  for (const auto& [name, value] : metrics) prefixed["rollout_corr/" + name] = value;
  return prefixed;
}

void check_verl_policy(GoldenCase& golden) {
  std::string mode = golden.text("loss_mode");
  const bool bypass = mode == "bypass_mode";
  LossArrays a;
  a.rows = matrix_rows(golden.input("response_mask"));
  a.log_probs = golden.values("log_prob");
  a.old_log_probs = golden.values(golden.has_input("rollout_log_prob") ? "rollout_log_prob" : "old_log_prob");
  a.advantages = golden.values("advantages");
  a.weights = golden.optional_values("rollout_is_weights").value_or(std::vector<double>{});
  std::map<std::string, double> metrics;
  if (bypass) {
    const std::string type = golden.text("loss_type");
    RLHF_CHECK(type == "ppo_clip" || type == "reinforce", "bypass loss_type '", type, "' is not known");
    mode = type == "reinforce" ? "reinforce" : "vanilla";
    RolloutCorrectionResult corrected =
        correct_rollout(verl_correction(golden), {a.rows.view(), a.log_probs, a.old_log_probs});
    metrics = with_prefix(corrected.metrics);
    a.rows.mask = corrected.mask;
    if (type == "reinforce") a.weights = corrected.weights;
  }
  PolicyLossOptions options = verl_objective(golden, mode);
  Scope scope;
  if (golden.has_param("global_batch_info")) scope = read_scope(golden.param("global_batch_info"));
  options.aggregation = verl_aggregation(golden.text("loss_agg_mode"), scope.scale);
  if (mode == "sapo") options.aggregation.mode = Aggregation::kSequenceMeanTokenMean;
  PolicyLossInputs inputs = a.inputs();
  inputs.context = scope.context;
  if (options.objective == PolicyObjective::kGeometricMean) inputs.context = {};
  const PolicyLossResult result = policy_loss(options, inputs);
  golden.check("loss", result.loss);
  golden.check("dloss_dlog_prob", result.d_log_probs);
  metrics.merge(verl_metrics(options, result.metrics));
  golden.check_metrics(metrics);
}

RolloutCorrectionOptions openrlhf_correction(GoldenCase& golden) {
  RolloutCorrectionOptions o;
  const std::string level = golden.text("is_correction_level");
  const std::string mode = golden.text("is_correction_mode");
  const std::string gate = golden.text("is_correction_gating");
  RLHF_CHECK(level == "off" || level == "token" || level == "seq", "is_correction_level '", level,
             "' is not known");
  RLHF_CHECK(mode == "mask" || mode == "clip", "is_correction_mode '", mode, "' is not known");
  RLHF_CHECK(gate == "ratio" || gate == "binary_kl" || gate == "tv", "is_correction_gating '", gate,
             "' is not known");
  if (level == "token") o.level = CorrectionLevel::kToken;
  if (level == "seq") o.level = CorrectionLevel::kSequenceGeometric;
  o.mode = mode == "mask" ? CorrectionMode::kMask : CorrectionMode::kClip;
  if (gate == "binary_kl") o.gate = CorrectionGate::kBinaryKl;
  if (gate == "tv") o.gate = CorrectionGate::kTv;
  const Tensor band = read_tensor(golden.param("is_correction_threshold"));
  RLHF_CHECK(band.values.size() == 2, "is_correction_threshold must have two numbers");
  o.lower = band.values[0];
  o.upper = band.values[1];
  o.log_ratio_bound = 0;
  return o;
}

void check_openrlhf_policy(GoldenCase& golden) {
  LossArrays a;
  a.rows = matrix_rows(golden.input("action_mask"));
  a.log_probs = golden.values("log_probs");
  a.old_log_probs = golden.values("old_log_probs");
  a.advantages = golden.values("advantages");
  const std::optional<std::vector<double>> rollout = golden.optional_values("rollout_log_probs");
  const RolloutCorrectionOptions correction = openrlhf_correction(golden);
  const std::string type = golden.text("policy_loss_type");
  RLHF_CHECK(type == "ppo" || type == "gspo", "policy_loss_type '", type, "' is not known");
  const bool gspo = type == "gspo";
  const bool corrected = correction.level != CorrectionLevel::kOff;

  PolicyLossOptions options;
  options.clip_low = golden.number("clip_eps_low");
  options.clip_high = golden.number("clip_eps_high");
  options.dual_clip = golden.number("dual_clip", 0);
  options.log_ratio_min = -20;
  options.log_ratio_max = 20;
  const bool token_mean = golden.flag("token_level_loss", true) && !gspo;
  options.aggregation = verl_aggregation(token_mean ? "token-mean" : "seq-mean-token-mean", 0);
  if (gspo) options.ratio_level = RatioLevel::kSequenceMean;

  PolicyLossInputs inputs = a.inputs();
  // GSPO corrects by taking the sampler as the anchor of its ratio.
  if (gspo && corrected) inputs.old_log_probs = *rollout;
  inputs.context = scope_params(golden).context;
  RolloutCorrectionResult weights;
  if (corrected && !gspo) {
    RLHF_CHECK(rollout.has_value(), "input 'rollout_log_probs' is missing");
    weights = correct_rollout(correction, {a.rows.view(), a.old_log_probs, *rollout});
    inputs.importance_weights = weights.weights;
  }
  const PolicyLossResult result = policy_loss(options, inputs);
  golden.check("loss", result.loss);
  golden.check("dloss_dlog_probs", result.d_log_probs);
  const Tolerance metric = golden.at_least(1e-6);
  golden.check("clip_ratio", result.metrics.clip_fraction, metric);
  // The metric compares with the trainer's old policy even when the ratio does not.
  inputs.old_log_probs = a.old_log_probs;
  golden.check("ppo_kl", policy_loss(options, inputs).metrics.approx_kl, metric);
  for (const auto& [key, value] : {std::pair("rollout_kl", corrected && !gspo ? weights.metrics["kl"] : 0.0),
                                   std::pair("is_filter_ratio", weights.filtered_fraction)}) {
    if (golden.has_output(key) && golden.output(key).is_null()) {
      if (corrected && !gspo) golden.fail_with(std::string(key) + " is null in spite of a correction");
      continue;
    }
    golden.check(key, value, metric);
  }
}

}  // namespace

void check_policy_loss(GoldenCase& golden, const nlohmann::json& source) {
  if (package_of(source) == "openrlhf") return check_openrlhf_policy(golden);
  RLHF_CHECK(package_of(source) == "verl", "package '", package_of(source), "' is not known");
  check_verl_policy(golden);
}

namespace {

// Mean over responses of a per-response share, as TRL reports it at the sequence level.
double row_share(const GoldenCase&, const MatrixRows& rows, const std::vector<double>& flags) {
  double sum = 0;
  for (std::size_t row = 0; row < rows.view().rows(); ++row) sum += flags[rows.view().begin(row)];
  return sum / static_cast<double>(rows.view().rows());
}

std::map<std::string, double> trl_metrics(GoldenCase& golden, const PolicyLossOptions& o, const LossArrays& a,
                                          const PolicyLossResult& result, double divisor) {
  const PolicyLossMetrics& m = result.metrics;
  std::map<std::string, double> metrics = {
      {"kl", m.reference_kl},
      {"entropy", m.entropy},
      {"entropy_coef", o.entropy_coefficient},
      {"policy_loss", (result.policy_loss + result.kl_loss) * divisor},
      {"clip_ratio/low_mean", m.clip_low_fraction},
      {"clip_ratio/high_mean", m.clip_high_fraction},
      {"clip_ratio/region_mean", m.clip_low_fraction + m.clip_high_fraction},
      {"clip_ratio/low_min", m.clip_low_min},
      {"clip_ratio/high_max", m.clip_high_max},
      {"cispo_clip_ratio", m.clip_high_fraction},
      {"vespo/phi_seq_mean", m.sequence_weight_mean}};
  if (o.ratio_level != RatioLevel::kSequenceMean) return metrics;
  // At the sequence level TRL averages over responses, not tokens: one response, one vote.
  MatrixRows one = a.rows;
  std::fill(one.mask.begin(), one.mask.end(), 0);
  for (std::size_t row = 0; row < one.view().rows(); ++row) one.mask[one.view().begin(row)] = 1;
  std::vector<double> low(a.log_probs.size());
  std::vector<double> high(a.log_probs.size());
  for (std::size_t row = 0; row < one.view().rows(); ++row) {
    LossArrays single;
    const std::size_t begin = one.view().begin(row);
    const std::size_t width = one.view().width(row);
    single.rows.offsets = {0, width};
    const auto cut = [&](const auto& v) {
      return std::vector(v.begin() + static_cast<std::ptrdiff_t>(begin),
                         v.begin() + static_cast<std::ptrdiff_t>(begin + width));
    };
    single.rows.mask = cut(a.rows.mask);
    single.log_probs = cut(a.log_probs);
    single.old_log_probs = cut(a.old_log_probs);
    single.advantages = cut(a.advantages);
    if (!a.reference.empty()) single.reference = cut(a.reference);
    single.entropies = cut(a.entropies);
    const PolicyLossMetrics each = policy_loss(o, single.inputs()).metrics;
    low[begin] = each.clip_low_fraction > 0;
    high[begin] = each.clip_high_fraction > 0;
  }
  metrics["clip_ratio/low_mean"] = row_share(golden, a.rows, low);
  metrics["clip_ratio/high_mean"] = row_share(golden, a.rows, high);
  metrics["clip_ratio/region_mean"] = metrics["clip_ratio/low_mean"] + metrics["clip_ratio/high_mean"];
  metrics["cispo_clip_ratio"] = metrics["clip_ratio/high_mean"];
  return metrics;
}

}  // namespace

void check_grpo_loss(GoldenCase& golden, const nlohmann::json& source) {
  RLHF_CHECK(package_of(source) == "trl", "package '", package_of(source), "' is not known");
  const TrlLossType type = trl_loss_type(golden.text("loss_type"));
  LossArrays a;
  a.rows = matrix_rows(golden.input("completion_mask"));
  a.log_probs = golden.values("per_token_logps");
  a.old_log_probs = golden.optional_values("old_per_token_logps").value_or(a.log_probs);
  a.reference = golden.optional_values("ref_per_token_logps").value_or(std::vector<double>{});
  a.entropies = golden.values("entropies");
  const std::vector<double> advantages = golden.values("advantages");
  for (std::size_t row = 0; row < a.rows.view().rows(); ++row) {
    a.advantages.insert(a.advantages.end(), a.rows.view().width(row), advantages.at(row));
  }
  const std::optional<std::vector<double>> weights = golden.optional_values("importance_sampling_ratio");
  if (golden.flag("importance_sampling_correction")) {
    RLHF_CHECK(weights.has_value(), "input 'importance_sampling_ratio' is missing");
    a.weights = *weights;
  }
  const PolicyLossOptions options = trl_policy_options(golden, type);
  PolicyLossInputs inputs = a.inputs();
  TrlMicroBatch batch;
  batch.rows = static_cast<double>(a.rows.view().rows());
  batch.accumulation = golden.number("gradient_accumulation_steps", 1);
  batch.steps_per_generation = golden.number("steps_per_generation", batch.accumulation);
  batch.tokens = read_tensor(golden.raw_input("num_items_in_batch")).values.at(0);
  inputs.context = trl_loss_context(type, batch);
  const PolicyLossResult result = policy_loss(options, inputs);
  // SAPO's temperatures are float32 numbers in the package.
  const Tolerance tolerance =
      type.objective == PolicyObjective::kSapo ? golden.at_least(1e-7) : golden.tolerance();
  golden.check("loss", result.loss, tolerance);
  golden.check("dloss_dper_token_logps", result.d_log_probs, tolerance);
  if (golden.has_output("dloss_dentropies")) golden.check("dloss_dentropies", result.d_entropies);
  golden.check_metrics(trl_metrics(golden, options, a, result, type.global_tokens ? 1 : batch.accumulation));
}

void check_value_loss(GoldenCase& golden, const nlohmann::json& source) {
  const bool verl = package_of(source) == "verl";
  RLHF_CHECK(verl || package_of(source) == "openrlhf", "package '", package_of(source), "' is not known");
  const MatrixRows rows = matrix_rows(golden.input(verl ? "response_mask" : "action_mask"));
  const std::vector<double> values = golden.values(verl ? "vpreds" : "values");
  const std::vector<double> old_values = golden.values(verl ? "values" : "old_values");
  const std::vector<double> returns = golden.values("returns");
  const Scope scope = scope_params(golden);
  ValueLossOptions options;
  options.clip_range = golden.number(verl ? "cliprange_value" : "clip_eps", 0);
  const std::string mode =
      verl ? golden.text("loss_agg_mode")
           : (golden.flag("token_level_loss", true) ? "token-mean" : "seq-mean-token-mean");
  options.aggregation = verl_aggregation(mode, scope.scale);
  const ValueLossResult result =
      value_loss(options, {rows.view(), values, old_values, returns, scope.context});
  golden.check("loss", result.loss);
  golden.check(verl ? "dloss_dvpreds" : "dloss_dvalues", result.d_values);
  if (verl) golden.check("clipfrac", result.clip_fraction, golden.at_least(1e-6));
}

void check_aggregation(GoldenCase& golden, const nlohmann::json& source) {
  RLHF_CHECK(package_of(source) == "verl", "package '", package_of(source), "' is not known");
  const MatrixRows rows = matrix_rows(golden.input("loss_mask"));
  const Scope scope = scope_params(golden);
  const std::vector<double> weights = aggregation_weights(
      verl_aggregation(golden.text("loss_agg_mode"), scope.scale), rows.view(), scope.context);
  golden.check("loss", weighted_sum(weights, golden.values("loss_mat")));
  golden.check("dloss_dmat", weights);
}

void check_rollout_correction(GoldenCase& golden, const nlohmann::json& source) {
  RLHF_CHECK(package_of(source) == "verl", "package '", package_of(source), "' is not known");
  const MatrixRows rows = matrix_rows(golden.input("response_mask"));
  const std::vector<double> old_log_probs = golden.values("old_log_prob");
  const std::vector<double> rollout_log_probs = golden.values("rollout_log_prob");
  const RolloutCorrectionResult result =
      correct_rollout(verl_correction(golden), {rows.view(), old_log_probs, rollout_log_probs});
  golden.check("modified_response_mask", std::vector<double>(result.mask.begin(), result.mask.end()));
  if (golden.has_output("rollout_is_weights")) golden.check("rollout_is_weights", result.weights);
  golden.check_metrics(with_prefix(result.metrics));
}

}  // namespace rlhf::verify

#include "rlhf/ppo/policy_loss.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "rlhf/core/error.h"
#include "rlhf/ppo/policy_objective.h"

namespace rlhf::ppo {
namespace {

bool needs_ratio(PolicyObjective objective) {
  return objective != PolicyObjective::kReinforce;
}

void check_inputs(const PolicyLossOptions& options, const PolicyLossInputs& in) {
  check_rows(in.rows);
  check_positions(in.rows, in.log_probs.size(), "policy loss: log_probs");
  check_positions(in.rows, in.advantages.size(), "policy loss: advantages");
  const bool ratio =
      needs_ratio(options.objective) || options.kl.ratio_weighted || options.off_policy_threshold;
  if (ratio || !in.old_log_probs.empty()) {
    check_positions(in.rows, in.old_log_probs.size(), "policy loss: old_log_probs");
  }
  if (options.kl.coefficient != 0) {
    check_positions(in.rows, in.reference_log_probs.size(), "policy loss: reference_log_probs");
  }
  if (options.entropy_coefficient != 0 || options.top_entropy_quantile < 1 || !in.entropies.empty()) {
    check_positions(in.rows, in.entropies.size(), "policy loss: entropies");
  }
  if (!in.importance_weights.empty()) {
    check_positions(in.rows, in.importance_weights.size(), "policy loss: importance_weights");
  }
  if (!in.behaviour_log_probs.empty()) {
    check_positions(in.rows, in.behaviour_log_probs.size(), "policy loss: behaviour_log_probs");
  }
  RLHF_CHECK(options.dual_clip == 0 || options.dual_clip > 1, "policy loss: dual_clip is ", options.dual_clip,
             ", expected 0 (off) or above 1");
}

struct Bounded {
  double value = 0;
  double slope = 1;
};

Bounded bound_exponent(const PolicyLossOptions& options, double exponent) {
  if (options.log_ratio_min && exponent < *options.log_ratio_min) return {*options.log_ratio_min, 0};
  if (options.log_ratio_max && exponent > *options.log_ratio_max) return {*options.log_ratio_max, 0};
  return {exponent, 1};
}

// Divisor of the row's log-ratio sum at a sequence level.
double sequence_divisor(const PolicyLossOptions& options, const TokenRows& rows, std::size_t row) {
  if (options.ratio_level == RatioLevel::kSequenceSum) return 1.0;
  return std::max(static_cast<double>(count_tokens(rows, row)), 1.0);
}

PolicyRatios compute_ratios(const PolicyLossOptions& options, const PolicyLossInputs& in) {
  const TokenRows& rows = in.rows;
  PolicyRatios ratios;
  ratios.raw_log.resize(rows.positions());
  ratios.bounded_log.resize(rows.positions());
  ratios.ratio.assign(rows.positions(), 1.0);
  ratios.slope.assign(rows.positions(), 1.0);
  if (in.old_log_probs.empty()) return ratios;
  for (std::size_t t = 0; t < rows.positions(); ++t) {
    ratios.raw_log[t] = in.log_probs[t] - in.old_log_probs[t];
    ratios.bounded_log[t] = bound_exponent(options, ratios.raw_log[t]).value;
  }
  for (std::size_t row = 0; row < rows.rows(); ++row) {
    const double mean = row_sum(rows, row, ratios.raw_log) / sequence_divisor(options, rows, row);
    for (std::size_t t = rows.begin(row); t < rows.end(row); ++t) {
      const double exponent = options.ratio_level == RatioLevel::kToken ? ratios.raw_log[t] : mean;
      const Bounded bounded = bound_exponent(options, exponent);
      ratios.ratio[t] = std::exp(bounded.value);
      ratios.slope[t] = bounded.slope;
    }
  }
  return ratios;
}

// Linear-interpolated quantile in single precision, as TRL takes it over the float32 entropies.
float entropy_threshold(const PolicyLossInputs& in, double quantile) {
  std::vector<float> sorted;
  for (std::size_t t = 0; t < in.entropies.size(); ++t) {
    if (in.rows.counts(t)) sorted.push_back(static_cast<float>(in.entropies[t]));
  }
  if (sorted.empty()) return std::numeric_limits<float>::infinity();
  std::sort(sorted.begin(), sorted.end());
  const float rank = static_cast<float>(quantile) * static_cast<float>(sorted.size() - 1);
  const auto below = static_cast<std::size_t>(std::floor(rank));
  const std::size_t above = std::min(below + 1, sorted.size() - 1);
  return sorted[below] + (rank - static_cast<float>(below)) * (sorted[above] - sorted[below]);
}

// 1 where a token's policy term trains, 0 where an entropy or off-policy gate leaves it out.
std::vector<double> entropy_gate(const PolicyLossOptions& options, const PolicyLossInputs& in) {
  std::vector<double> gate(in.rows.positions(), 1.0);
  if (options.top_entropy_quantile >= 1) return gate;
  const double threshold = entropy_threshold(in, 1.0 - options.top_entropy_quantile);
  for (std::size_t t = 0; t < gate.size(); ++t) {
    gate[t] = in.rows.counts(t) && in.entropies[t] >= threshold ? 1.0 : 0.0;
  }
  return gate;
}

void apply_off_policy_gate(const PolicyLossOptions& options, const PolicyLossInputs& in,
                           std::vector<double>& gate) {
  if (!options.off_policy_threshold) return;
  const TokenRows& rows = in.rows;
  const auto behaviour = in.behaviour_log_probs.empty() ? in.old_log_probs : in.behaviour_log_probs;
  for (std::size_t row = 0; row < rows.rows(); ++row) {
    const double tokens = std::max(static_cast<double>(count_tokens(rows, row)), 1.0);
    const double drift = (row_sum(rows, row, behaviour) - row_sum(rows, row, in.log_probs)) / tokens;
    for (std::size_t t = rows.begin(row); t < rows.end(row); ++t) {
      if (in.advantages[t] < 0 && drift > *options.off_policy_threshold) gate[t] = 0;
    }
  }
}

// Adds to `gradient` what flows through the exponents of the ratios: d_exponent holds weight * d term / d
// exponent.
void add_ratio_gradient(const PolicyLossOptions& options, const TokenRows& rows,
                        std::span<const double> d_exponent, std::span<double> gradient) {
  const bool per_token = options.ratio_level == RatioLevel::kToken ||
                         options.ratio_level == RatioLevel::kSequenceMeanTokenGradient;
  for (std::size_t row = 0; row < rows.rows(); ++row) {
    double shared = 0;
    for (std::size_t t = rows.begin(row); t < rows.end(row); ++t) shared += d_exponent[t];
    shared /= sequence_divisor(options, rows, row);
    for (std::size_t t = rows.begin(row); t < rows.end(row); ++t) {
      if (per_token) {
        gradient[t] += d_exponent[t];
      } else if (rows.counts(t)) {
        gradient[t] += shared;
      }
    }
  }
}

struct TermSums {
  std::vector<double> clipped;
  std::vector<double> dual_clipped;
};

void add_policy_terms(const PolicyLossOptions& options, const PolicyLossInputs& in,
                      const PolicyRatios& ratios, std::span<const double> weights, PolicyLossResult& result) {
  const std::size_t positions = in.rows.positions();
  std::vector<double> gate = entropy_gate(options, in);
  apply_off_policy_gate(options, in, gate);
  SequenceTerms coupled;
  if (is_coupled(options.objective)) coupled = coupled_objective(options, in, ratios);
  // VESPO folds the importance weights into phi.
  const bool weighted = !in.importance_weights.empty() && options.objective != PolicyObjective::kVespo;

  result.ratios = ratios.ratio;
  result.token_losses.resize(positions);
  TermSums sums{std::vector<double>(positions), std::vector<double>(positions)};
  std::vector<double> d_exponent(positions, 0.0);
  for (std::size_t t = 0; t < positions; ++t) {
    if (!in.rows.counts(t)) continue;
    const ObjectiveTerm term =
        is_coupled(options.objective) ? coupled.terms[t] : token_objective(options, in, ratios, t);
    sums.clipped[t] = term.clipped;
    sums.dual_clipped[t] = term.dual_clipped;
    const double factor = gate[t] * (weighted ? in.importance_weights[t] : 1.0);
    const double weight = weights[t] * factor;
    // A factor of 0 leaves the term out, also one that is not finite.
    if (factor != 0) result.token_losses[t] = factor * term.value;
    if (weight == 0) continue;
    result.policy_loss += weight * term.value;
    result.d_log_probs[t] += weight * term.d_log_prob;
    d_exponent[t] = weight * term.d_exponent;
  }
  add_ratio_gradient(options, in.rows, d_exponent, result.d_log_probs);
  result.metrics.clip_fraction = masked_mean(in.rows, sums.clipped);
  result.metrics.dual_clip_fraction = masked_mean(in.rows, sums.dual_clipped);
  for (const double phi : coupled.sequence_weights) {
    result.metrics.sequence_weight_mean += phi / static_cast<double>(coupled.sequence_weights.size());
  }
}

void add_kl_terms(const PolicyLossOptions& options, const PolicyLossInputs& in, const PolicyRatios& ratios,
                  std::span<const double> weights, PolicyLossResult& result) {
  if (options.kl.coefficient == 0) return;
  const std::size_t positions = in.rows.positions();
  std::vector<double>& kl = result.token_kl;
  kl.resize(positions);
  std::vector<double> d_exponent(positions, 0.0);
  for (std::size_t t = 0; t < positions; ++t) {
    if (!in.rows.counts(t)) continue;
    const double old = in.old_log_probs.empty() ? in.log_probs[t] : in.old_log_probs[t];
    ValueAndGradient term =
        estimate_kl(options.kl.estimator, {in.log_probs[t], in.reference_log_probs[t], old});
    const double weight = options.kl.coefficient * weights[t];
    if (options.kl.ratio_weighted) {
      if (weight != 0) d_exponent[t] = weight * term.value * ratios.ratio[t] * ratios.slope[t];
      term.value *= ratios.ratio[t];
      term.gradient *= ratios.ratio[t];
    }
    kl[t] = term.value;
    if (weight == 0) continue;
    result.kl_loss += weight * term.value;
    result.d_log_probs[t] += weight * term.gradient;
  }
  if (options.kl.ratio_weighted) add_ratio_gradient(options, in.rows, d_exponent, result.d_log_probs);
  result.metrics.reference_kl = masked_mean(in.rows, kl);
}

void add_entropy_bonus(const PolicyLossOptions& options, const PolicyLossInputs& in,
                       PolicyLossResult& result) {
  if (!in.entropies.empty()) result.metrics.entropy = masked_mean(in.rows, in.entropies);
  if (options.entropy_coefficient == 0) return;
  std::vector<std::uint8_t> mask(in.rows.positions());
  const std::vector<double> gate = entropy_gate(options, in);
  for (std::size_t t = 0; t < mask.size(); ++t) mask[t] = in.rows.counts(t) && gate[t] != 0;
  const TokenRows rows{in.rows.offsets, mask};
  std::vector<double> weights;
  if (options.entropy_aggregation == EntropyAggregation::kAsLoss) {
    weights = aggregation_weights(options.aggregation, rows, in.context);
  } else {
    AggregationContext context;
    context.micro_batches = in.context.micro_batches;
    context.total_tokens = in.context.total_tokens;
    weights = aggregation_weights({}, rows, context);
  }
  result.entropy_bonus = options.entropy_coefficient * weighted_sum(weights, in.entropies);
  result.d_entropies.resize(weights.size());
  for (std::size_t t = 0; t < weights.size(); ++t)
    result.d_entropies[t] = -options.entropy_coefficient * weights[t];
}

void measure_clipping(const PolicyLossOptions& options, const PolicyLossInputs& in,
                      const PolicyRatios& ratios, PolicyLossMetrics& metrics) {
  const TokenRows& rows = in.rows;
  std::vector<double> low(rows.positions());
  std::vector<double> high(rows.positions());
  for (std::size_t t = 0; t < rows.positions(); ++t) {
    const double ratio =
        options.ratio_cap > 0 ? std::min(ratios.ratio[t], options.ratio_cap) : ratios.ratio[t];
    low[t] = ratio < 1.0 - options.clip_low && in.advantages[t] < 0;
    high[t] = ratio > 1.0 + options.clip_high && in.advantages[t] > 0;
  }
  metrics.clip_low_fraction = masked_mean(rows, low);
  metrics.clip_high_fraction = masked_mean(rows, high);
  bool first = true;
  for (std::size_t row = 0; row < rows.rows(); ++row) {
    const auto tokens = static_cast<double>(count_tokens(rows, row));
    if (tokens == 0) continue;
    const double row_low = row_sum(rows, row, low) / tokens;
    metrics.clip_low_min = first ? row_low : std::min(metrics.clip_low_min, row_low);
    metrics.clip_high_max = std::max(metrics.clip_high_max, row_sum(rows, row, high) / tokens);
    first = false;
  }
}

void measure_drift(const PolicyLossInputs& in, const PolicyRatios& ratios, PolicyLossMetrics& metrics) {
  const auto tokens = static_cast<double>(count_tokens(in.rows));
  if (tokens == 0) return;
  metrics.approx_kl = -masked_mean(in.rows, ratios.raw_log);
  metrics.approx_kl_bounded = -masked_mean(in.rows, ratios.bounded_log);
  metrics.ratio_mean = masked_mean(in.rows, ratios.ratio);
  for (std::size_t t = 0; t < in.rows.positions(); ++t) {
    if (!in.rows.counts(t)) continue;
    const double log_ratio = ratios.raw_log[t];
    const double deviation = ratios.ratio[t] - metrics.ratio_mean;
    metrics.approx_kl_k2 += 0.5 * log_ratio * log_ratio / tokens;
    metrics.absolute_log_ratio += std::abs(log_ratio) / tokens;
    metrics.ratio_variance += deviation * deviation / tokens;
  }
}

}  // namespace

AggregationContext scope_totals(const PolicyLossOptions& options, const TokenRows& scope) {
  AggregationContext totals = scope_totals(options.aggregation, scope);
  if (options.objective == PolicyObjective::kGeometricMean)
    totals.total_sequences = static_cast<double>(scope.rows());
  return totals;
}

double scope_divisor(const PolicyLossOptions& options, const AggregationContext& totals) {
  AggregationOptions aggregation = options.aggregation;
  if (options.objective == PolicyObjective::kGeometricMean)
    aggregation.mode = Aggregation::kSequenceMeanTokenMean;
  return scope_divisor(aggregation, totals);
}

bool vanishes_with_advantage(const PolicyLossOptions& options) {
  switch (options.objective) {
    case PolicyObjective::kDro:      // the squared log-ratio stays
    case PolicyObjective::kClipCov:  // tokens are chosen among all of the rows
    case PolicyObjective::kKlCov:
      return false;
    default:
      return options.kl.coefficient == 0 && options.entropy_coefficient == 0 &&
             options.top_entropy_quantile >= 1;
  }
}

bool needs_totals(const PolicyLossOptions& options) {
  if (needs_widest_row(options.aggregation)) return true;
  const bool entropy = options.entropy_coefficient != 0;
  if (options.objective == PolicyObjective::kGeometricMean) return entropy || options.kl.coefficient != 0;
  return entropy && options.entropy_aggregation == EntropyAggregation::kTokenMean &&
         options.aggregation.mode != Aggregation::kTokenMean;
}

PolicyLossResult policy_loss(const PolicyLossOptions& options, const PolicyLossInputs& inputs) {
  check_inputs(options, inputs);
  const PolicyRatios ratios = compute_ratios(options, inputs);
  const std::vector<double> weights = aggregation_weights(options.aggregation, inputs.rows, inputs.context);

  PolicyLossResult result;
  result.d_log_probs.assign(inputs.rows.positions(), 0.0);
  if (options.objective == PolicyObjective::kGeometricMean) {
    geometric_mean_loss(options, inputs, result);
  } else {
    add_policy_terms(options, inputs, ratios, weights, result);
  }
  add_kl_terms(options, inputs, ratios, weights, result);
  add_entropy_bonus(options, inputs, result);
  measure_clipping(options, inputs, ratios, result.metrics);
  measure_drift(inputs, ratios, result.metrics);
  result.loss = result.policy_loss + result.kl_loss - result.entropy_bonus;
  return result;
}

}  // namespace rlhf::ppo

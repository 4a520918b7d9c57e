#include "rlhf/ppo/policy_objective.h"

#include <algorithm>
#include <cmath>

#include "rlhf/core/error.h"
#include "rlhf/core/random.h"
#include "rlhf/ppo/logistic.h"

namespace rlhf::ppo {
namespace {

ObjectiveTerm clip_term(const PolicyLossOptions& options, double ratio, double advantage, double slope) {
  const bool capped = options.ratio_cap > 0 && ratio > options.ratio_cap;
  const double free_ratio = capped ? options.ratio_cap : ratio;
  const double low = 1.0 - options.clip_low;
  const double high = 1.0 + options.clip_high;
  const double free_loss = -advantage * free_ratio;
  const double clipped_loss = -advantage * std::clamp(ratio, low, high);

  ObjectiveTerm term;
  term.clipped = clipped_loss > free_loss;
  term.value = term.clipped ? clipped_loss : free_loss;
  const bool outside = ratio < low || ratio > high;
  if (term.clipped ? !outside : !capped) term.d_exponent = -advantage * ratio * slope;
  if (options.dual_clip > 0 && advantage < 0 && term.value > -advantage * options.dual_clip) {
    term.dual_clipped = true;
    term.value = -advantage * options.dual_clip;
    term.d_exponent = 0;
  }
  return term;
}

ObjectiveTerm cispo_term(const PolicyLossOptions& options, double ratio, double advantage, double log_prob) {
  const double bounded = std::clamp(ratio, 1.0 - options.clip_low, 1.0 + options.clip_high);
  ObjectiveTerm term;
  term.value = -bounded * advantage * log_prob;
  term.d_log_prob = -bounded * advantage;
  term.clipped = bounded != ratio;
  return term;
}

ObjectiveTerm sapo_term(const PolicyLossOptions& options, double ratio, double advantage, double slope) {
  const double tau = advantage > 0 ? options.sapo_tau_positive : options.sapo_tau_negative;
  const double gate = sigmoid(tau * (ratio - 1.0));
  ObjectiveTerm term;
  term.value = -gate * 4.0 / tau * advantage;
  term.d_exponent = -advantage * 4.0 * gate * (1.0 - gate) * ratio * slope;
  return term;
}

ObjectiveTerm dro_term(const PolicyLossOptions& options, double log_ratio, double advantage,
                       double log_prob) {
  ObjectiveTerm term;
  term.value = -(log_prob * advantage - 0.5 * options.dro_beta * log_ratio * log_ratio);
  term.d_log_prob = -advantage + options.dro_beta * log_ratio;
  return term;
}

// Sampled-token KL between the two-outcome distributions (token, not token) of old and new policy.
double binary_kl(double old_log_prob, double log_prob) {
  constexpr double kEpsilon = 1e-8;
  const double old_prob = std::exp(old_log_prob);
  const double prob = std::exp(log_prob);
  return old_prob * (old_log_prob - log_prob) +
         (1.0 - old_prob) * std::log((1.0 - old_prob + kEpsilon) / (1.0 - prob + kEpsilon));
}

bool inside_divergence_band(const PolicyLossOptions& options, double old_log_prob, double log_prob,
                            double advantage) {
  const double moved = std::exp(log_prob) - std::exp(old_log_prob);
  if (options.objective == PolicyObjective::kDppoTv) {
    return advantage > 0 ? moved <= options.clip_high : moved >= -options.clip_low;
  }
  const double divergence = binary_kl(old_log_prob, log_prob);
  return advantage > 0 ? divergence <= options.clip_high || moved <= 0
                       : divergence <= options.clip_low || moved >= 0;
}

ObjectiveTerm dppo_term(const PolicyLossOptions& options, const PolicyLossInputs& inputs, double ratio,
                        std::size_t position) {
  const double advantage = inputs.advantages[position];
  const double log_prob = inputs.log_probs[position];
  ObjectiveTerm term;
  term.clipped = !inside_divergence_band(options, inputs.old_log_probs[position], log_prob, advantage);
  if (term.clipped) return term;
  const bool truncated = options.dual_clip > 0 && ratio > options.dual_clip;
  const double weight = truncated ? options.dual_clip : ratio;
  term.dual_clipped = truncated;
  term.value = -advantage * weight * log_prob;
  term.d_log_prob = -advantage * weight;
  return term;
}

// (A - mean A)(lp - mean lp) per position: how much the token drives the entropy down.
std::vector<double> token_covariances(const PolicyLossInputs& inputs) {
  const double mean_advantage = masked_mean(inputs.rows, inputs.advantages);
  const double mean_log_prob = masked_mean(inputs.rows, inputs.log_probs);
  std::vector<double> covariances(inputs.rows.positions());
  for (std::size_t t = 0; t < covariances.size(); ++t) {
    covariances[t] = (inputs.advantages[t] - mean_advantage) * (inputs.log_probs[t] - mean_log_prob);
  }
  return covariances;
}

}  // namespace

ObjectiveTerm token_objective(const PolicyLossOptions& options, const PolicyLossInputs& inputs,
                              const PolicyRatios& ratios, std::size_t t) {
  const double advantage = inputs.advantages[t];
  const double log_prob = inputs.log_probs[t];
  switch (options.objective) {
    case PolicyObjective::kClip:
    case PolicyObjective::kClipCov:
      return clip_term(options, ratios.ratio[t], advantage, ratios.slope[t]);
    case PolicyObjective::kKlCov: {
      ObjectiveTerm term;
      term.value = -advantage * ratios.ratio[t];
      term.d_exponent = term.value * ratios.slope[t];
      return term;
    }
    case PolicyObjective::kCispo:
      return cispo_term(options, ratios.ratio[t], advantage, log_prob);
    case PolicyObjective::kSapo:
      return sapo_term(options, ratios.ratio[t], advantage, ratios.slope[t]);
    case PolicyObjective::kReinforce: {
      ObjectiveTerm term;
      term.value = -advantage * log_prob;
      term.d_log_prob = -advantage;
      return term;
    }
    case PolicyObjective::kDro:
      return dro_term(options, ratios.raw_log[t], advantage, log_prob);
    case PolicyObjective::kDppoTv:
    case PolicyObjective::kDppoKl:
      return dppo_term(options, inputs, ratios.ratio[t], t);
    default:
      fail<InternalError>("token_objective: objective ", static_cast<int>(options.objective),
                          " is not per token");
  }
}

bool is_coupled(PolicyObjective objective) {
  return objective == PolicyObjective::kClipCov || objective == PolicyObjective::kKlCov ||
         objective == PolicyObjective::kVespo;
}

namespace {

std::vector<ObjectiveTerm> all_token_terms(const PolicyLossOptions& options, const PolicyLossInputs& inputs,
                                           const PolicyRatios& ratios) {
  std::vector<ObjectiveTerm> terms(inputs.rows.positions());
  for (std::size_t t = 0; t < terms.size(); ++t) terms[t] = token_objective(options, inputs, ratios, t);
  return terms;
}

SequenceTerms clip_cov(const PolicyLossOptions& options, const PolicyLossInputs& inputs,
                       const PolicyRatios& ratios) {
  SequenceTerms result{all_token_terms(options, inputs, ratios), {}};
  const std::vector<double> covariances = token_covariances(inputs);
  std::vector<std::size_t> candidates;
  for (std::size_t t = 0; t < covariances.size(); ++t) {
    const bool in_band = covariances[t] > options.covariance.low && covariances[t] < options.covariance.high;
    if (inputs.rows.counts(t) && !result.terms[t].clipped && in_band) candidates.push_back(t);
  }
  const auto tokens = static_cast<double>(count_tokens(inputs.rows));
  const auto wanted =
      std::max<std::size_t>(static_cast<std::size_t>(options.covariance.fraction * tokens), 1);
  RandomStream random(inputs.seed);
  for (ObjectiveTerm& term : result.terms) term.clipped = false;
  for (std::size_t chosen = 0; chosen < std::min(wanted, candidates.size()); ++chosen) {
    std::swap(candidates[chosen], candidates[chosen + random.below(candidates.size() - chosen)]);
    result.terms[candidates[chosen]] = ObjectiveTerm{.clipped = true};
  }
  return result;
}

SequenceTerms kl_cov(const PolicyLossOptions& options, const PolicyLossInputs& inputs,
                     const PolicyRatios& ratios) {
  SequenceTerms result{all_token_terms(options, inputs, ratios), {}};
  const std::vector<double> covariances = token_covariances(inputs);
  std::vector<std::size_t> order;
  for (std::size_t t = 0; t < covariances.size(); ++t) {
    if (inputs.rows.counts(t)) order.push_back(t);
  }
  if (order.empty() || options.covariance.fraction <= 0) return result;
  const auto share =
      static_cast<std::size_t>(static_cast<double>(order.size()) * options.covariance.fraction);
  const std::size_t wanted = std::min(std::max<std::size_t>(share, 1), order.size());
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return covariances[a] > covariances[b]; });
  for (std::size_t i = 0; i < wanted; ++i) {
    const double log_ratio = ratios.raw_log[order[i]];
    ObjectiveTerm& term = result.terms[order[i]];
    term.value += options.covariance.kl_coefficient * std::abs(log_ratio);
    term.d_log_prob +=
        options.covariance.kl_coefficient * (log_ratio > 0 ? 1.0 : (log_ratio < 0 ? -1.0 : 0.0));
  }
  return result;
}

// Gamma-shaped weight of the whole response's ratio, for one sign of the advantage.
double vespo_weight(const VespoOptions& options, double log_weight, double advantage) {
  const double k = advantage >= 0 ? options.k_positive : options.k_negative;
  const double lambda = std::max(advantage >= 0 ? options.lambda_positive : options.lambda_negative, 1e-4);
  const double phi = std::exp(lambda + k * log_weight - lambda * std::exp(log_weight));
  return std::isfinite(phi) ? phi : 0.0;
}

SequenceTerms vespo(const PolicyLossOptions& options, const PolicyLossInputs& inputs,
                    const PolicyRatios& ratios) {
  const TokenRows& rows = inputs.rows;
  const double floor = std::log(1e-8);
  SequenceTerms result;
  result.terms.resize(rows.positions());
  for (std::size_t row = 0; row < rows.rows(); ++row) {
    double log_weight = 0;
    for (std::size_t t = rows.begin(row); t < rows.end(row); ++t) {
      if (rows.counts(t)) log_weight += std::clamp(ratios.raw_log[t], -20.0, 20.0);
      // TRL sums this factor over the whole row, mask or not; responses without holes do not differ.
      if (!inputs.importance_weights.empty()) {
        log_weight += std::clamp(std::log(inputs.importance_weights[t]), floor, 20.0);
      }
    }
    log_weight = std::clamp(log_weight, floor, 20.0);
    double row_weight = 0;
    for (std::size_t t = rows.begin(row); t < rows.end(row); ++t) {
      const double advantage = inputs.advantages[t];
      const double phi = vespo_weight(options.vespo, log_weight, advantage);
      result.terms[t].value = -phi * advantage * inputs.log_probs[t];
      result.terms[t].d_log_prob = -phi * advantage;
      if (t == rows.begin(row)) row_weight = phi;
    }
    result.sequence_weights.push_back(row_weight);
  }
  return result;
}

}  // namespace

SequenceTerms coupled_objective(const PolicyLossOptions& options, const PolicyLossInputs& inputs,
                                const PolicyRatios& ratios) {
  if (options.objective == PolicyObjective::kClipCov) return clip_cov(options, inputs, ratios);
  if (options.objective == PolicyObjective::kKlCov) return kl_cov(options, inputs, ratios);
  return vespo(options, inputs, ratios);
}

void geometric_mean_loss(const PolicyLossOptions& options, const PolicyLossInputs& inputs,
                         PolicyLossResult& result) {
  constexpr double kEpsilon = 1e-8;
  const TokenRows& rows = inputs.rows;
  const double total_rows = inputs.context.total_sequences.value_or(static_cast<double>(rows.rows()));
  const double scale =
      total_rows > 0 ? inputs.context.data_parallel_size / (total_rows * inputs.context.micro_batches) : 0;
  std::size_t clipped_up = 0;
  std::size_t clipped_down = 0;
  for (std::size_t row = 0; row < rows.rows(); ++row) {
    const double tokens = static_cast<double>(count_tokens(rows, row)) + kEpsilon;
    std::vector<double> slope(rows.width(row), 0.0);
    double log_ratio_sum = 0;
    double advantage_sum = 0;
    double log_weight_sum = 0;
    for (std::size_t t = rows.begin(row); t < rows.end(row); ++t) {
      if (!rows.counts(t)) continue;
      const double advantage = inputs.advantages[t];
      const double sign = advantage > 0 ? 1.0 : (advantage < 0 ? -1.0 : 0.0);
      const double log_ratio = inputs.log_probs[t] - inputs.old_log_probs[t];
      const double bounded = std::clamp(log_ratio, -options.clip_low, options.clip_high);
      const bool take_bound = sign * bounded < sign * log_ratio;
      log_ratio_sum += sign * sign * (take_bound ? bounded : log_ratio);
      slope[t - rows.begin(row)] = take_bound ? 0.0 : sign * sign;
      advantage_sum += advantage;
      if (!inputs.importance_weights.empty())
        log_weight_sum += std::log(inputs.importance_weights[t] + 1e-10);
      clipped_up += bounded != log_ratio && advantage > 0;
      clipped_down += bounded != log_ratio && advantage < 0;
    }
    const double loss = -advantage_sum / tokens * std::exp((log_ratio_sum + log_weight_sum) / tokens) * scale;
    result.policy_loss += loss;
    for (std::size_t t = rows.begin(row); t < rows.end(row); ++t) {
      result.d_log_probs[t] += loss * slope[t - rows.begin(row)] / tokens;
    }
  }
  const auto tokens = static_cast<double>(count_tokens(rows));
  if (tokens > 0) {
    result.metrics.clip_fraction = static_cast<double>(clipped_up) / tokens;
    result.metrics.dual_clip_fraction = static_cast<double>(clipped_down) / tokens;
  }
}

}  // namespace rlhf::ppo

#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "rlhf/config/field.h"
#include "rlhf/ppo/aggregation.h"
#include "rlhf/ppo/kl.h"

namespace rlhf::ppo {

/// The per-token objective. r: probability ratio to the old policy, A: advantage, lp: log-prob, sg: no
/// gradient.
enum class PolicyObjective {
  kClip,           ///< -min(r A, clip(r) A), optionally dual-clipped (PPO, DAPO, GSPO, decoupled PPO)
  kCispo,          ///< -sg(clip(r)) A lp (MiniMax-M1)
  kSapo,           ///< -(4 / tau) sigmoid(tau (r - 1)) A, tau by the sign of A (Qwen SAPO)
  kVespo,          ///< -phi(w) A lp, phi a gamma-shaped weight of the sequence ratio (VESPO)
  kReinforce,      ///< -A lp (REINFORCE, GPG)
  kGeometricMean,  ///< -A exp(mean of clipped log-ratios), one term per response (GMPO)
  kClipCov,        ///< kClip without gradient on tokens of high covariance (Clip-Cov, arXiv 2505.22617)
  kKlCov,          ///< -r A, plus |log r| on the tokens of highest covariance (KL-Cov, the same paper)
  kDro,            ///< -(A lp - beta/2 (log r)^2) (DRO)
  kDppoTv,         ///< -sg(min(r, c)) A lp where |pi - pi_old| stays in a band (DPPO)
  kDppoKl,         ///< the same with a band on the binary KL
};

/// Over what the ratio is formed, and where its gradient goes.
enum class RatioLevel {
  kToken,
  kSequenceMean,               ///< exp(mean log-ratio), gradient through the mean (GSPO of TRL and OpenRLHF)
  kSequenceMeanTokenGradient,  ///< the same value, gradient of each token through itself (GSPO-token, verl)
  kSequenceSum,                ///< exp(sum of log-ratios): sequence probability ratio (TRL RLOO)
};

/// Whether the mean of the entropy bonus follows the loss or is always a mean over tokens.
enum class EntropyAggregation { kAsLoss, kTokenMean };

struct PolicyKlOptions {
  double coefficient = 0;  ///< weight of the KL term in the loss; 0 = none
  KlEstimatorOptions estimator;
  /// Multiply the term by the policy ratio, which makes it unbiased off policy (TRL use_bias_correction_kl).
  bool ratio_weighted = false;

  template <class V>
  void visit_fields(V& v) {
    v.field("coefficient", coefficient, "Weight of the KL to the reference in the loss; 0 = none",
            config::at_least(0));
    v.group("estimator", estimator, "Estimate of the KL");
    v.field("ratio_weighted", ratio_weighted, "Multiply the KL term by the policy ratio");
  }
};

struct CovarianceOptions {
  double fraction = 2e-4;  ///< share of tokens that are treated specially
  double low = 1.0;        ///< clip-cov: tokens with covariance in (low, high) are candidates
  double high = 5.0;
  double kl_coefficient = 1.0;  ///< kl-cov: weight of |log r| on the chosen tokens

  template <class V>
  void visit_fields(V& v) {
    v.field("fraction", fraction, "Share of tokens treated specially", config::fraction());
    v.field("low", low, "Lower covariance bound of clip_cov");
    v.field("high", high, "Upper covariance bound of clip_cov");
    v.field("kl_coefficient", kl_coefficient, "Weight of |log ratio| in kl_cov", config::at_least(0));
  }
};

struct VespoOptions {
  double k_positive = 2.0, lambda_positive = 3.0;  ///< shape and rate for A >= 0
  double k_negative = 3.0, lambda_negative = 2.0;  ///< for A < 0

  template <class V>
  void visit_fields(V& v) {
    v.field("k_positive", k_positive, "Shape for advantages >= 0", config::at_least(0));
    v.field("lambda_positive", lambda_positive, "Rate for advantages >= 0", config::at_least(0));
    v.field("k_negative", k_negative, "Shape for advantages < 0", config::at_least(0));
    v.field("lambda_negative", lambda_negative, "Rate for advantages < 0", config::at_least(0));
  }
};

struct PolicyLossOptions {
  PolicyObjective objective = PolicyObjective::kClip;
  RatioLevel ratio_level = RatioLevel::kToken;
  double clip_low = 0.2;   ///< the ratio is clipped below 1 - clip_low
  double clip_high = 0.2;  ///< and above 1 + clip_high ("clip-higher": 0.28)
  double dual_clip = 0;    ///< c > 1: loss of A < 0 is at most -c A; 0 = off. Also the cap of DPPO (0 = none)
  double ratio_cap = 0;    ///< cap of the unclipped branch's ratio (TRL delta); 0 = off
  std::optional<double> log_ratio_min;  ///< log-ratios below are raised to it, without gradient
  std::optional<double> log_ratio_max;  ///< log-ratios above are lowered to it, without gradient
  double sapo_tau_positive = 1.0;
  double sapo_tau_negative = 1.05;
  double dro_beta = 0.1;
  CovarianceOptions covariance;
  VespoOptions vespo;
  AggregationOptions aggregation;
  PolicyKlOptions kl;
  double entropy_coefficient = 0;  ///< loss -= coefficient * aggregate(entropy)
  EntropyAggregation entropy_aggregation = EntropyAggregation::kAsLoss;
  /// Only the given share of tokens with the highest entropy trains the policy term; 1 = all (Wang et al.
  /// 2025).
  double top_entropy_quantile = 1.0;
  /// Responses with A < 0 whose mean log(behaviour / policy) is above it are left out (DeepSeek-V3.2); none =
  /// off.
  std::optional<double> off_policy_threshold;

  template <class V>
  void visit_fields(V& v) {
    v.choice("objective", objective,
             {{"clip", PolicyObjective::kClip},
              {"cispo", PolicyObjective::kCispo},
              {"sapo", PolicyObjective::kSapo},
              {"vespo", PolicyObjective::kVespo},
              {"reinforce", PolicyObjective::kReinforce},
              {"geometric_mean", PolicyObjective::kGeometricMean},
              {"clip_cov", PolicyObjective::kClipCov},
              {"kl_cov", PolicyObjective::kKlCov},
              {"dro", PolicyObjective::kDro},
              {"dppo_tv", PolicyObjective::kDppoTv},
              {"dppo_kl", PolicyObjective::kDppoKl}},
             "Per-token policy objective");
    v.choice("ratio_level", ratio_level,
             {{"token", RatioLevel::kToken},
              {"sequence_mean", RatioLevel::kSequenceMean},
              {"sequence_mean_token_gradient", RatioLevel::kSequenceMeanTokenGradient},
              {"sequence_sum", RatioLevel::kSequenceSum}},
             "Over what the probability ratio is formed");
    v.field("clip_low", clip_low, "The ratio is clipped below 1 - clip_low", config::at_least(0));
    v.field("clip_high", clip_high, "The ratio is clipped above 1 + clip_high", config::at_least(0));
    v.field("dual_clip", dual_clip, "Bound c of the loss for negative advantages; 0 turns it off",
            config::at_least(0));
    v.field("ratio_cap", ratio_cap, "Cap of the ratio in the unclipped branch; 0 turns it off",
            config::at_least(0));
    v.field("log_ratio_min", log_ratio_min, "Lower bound of the log-ratio; none = off");
    v.field("log_ratio_max", log_ratio_max, "Upper bound of the log-ratio; none = off");
    v.field("sapo_tau_positive", sapo_tau_positive, "SAPO temperature for advantages > 0",
            config::positive());
    v.field("sapo_tau_negative", sapo_tau_negative, "SAPO temperature for advantages <= 0",
            config::positive());
    v.field("dro_beta", dro_beta, "DRO weight of the squared log-ratio", config::positive());
    v.group("covariance", covariance, "Clip-Cov and KL-Cov");
    v.group("vespo", vespo, "VESPO weights");
    v.group("aggregation", aggregation, "How per-token losses become one number");
    v.group("kl", kl, "KL to the reference in the loss");
    v.field("entropy_coefficient", entropy_coefficient, "Weight of the entropy bonus; 0 = none",
            config::at_least(0));
    v.choice("entropy_aggregation", entropy_aggregation,
             {{"as_loss", EntropyAggregation::kAsLoss}, {"token_mean", EntropyAggregation::kTokenMean}},
             "Aggregation of the entropy bonus");
    v.field("top_entropy_quantile", top_entropy_quantile,
            "Share of tokens, by entropy, that train the policy; 1 = all", config::fraction());
    v.field(
        "off_policy_threshold", off_policy_threshold,
        "Mean log(behaviour/policy) above which a response with negative advantage is left out; none = off");
  }
};

/// Everything is per position of `rows`; views only. Positions under the mask may hold any finite number.
struct PolicyLossInputs {
  TokenRows rows;
  std::span<const double> log_probs;      ///< log pi(y_t), the variable of the gradient
  std::span<const double> old_log_probs;  ///< anchor of the ratio (proximal policy); unused by kReinforce
  std::span<const double> advantages;
  std::span<const double> reference_log_probs;  ///< needed when kl.coefficient > 0
  std::span<const double> entropies;            ///< needed by the entropy bonus and top_entropy_quantile
  std::span<const double> importance_weights;   ///< factor of the policy term, no gradient; empty = 1
  std::span<const double> behaviour_log_probs;  ///< for off_policy_threshold; empty = old_log_probs
  AggregationContext context;
  std::uint64_t seed = 0;  ///< of kClipCov's random choice
};

/// Means over the counting tokens of the rows at hand unless said otherwise.
struct PolicyLossMetrics {
  double clip_fraction = 0;       ///< share of tokens whose clipped branch is active
  double dual_clip_fraction = 0;  ///< share of tokens bounded by dual_clip (DPPO: truncated and valid)
  double clip_low_fraction = 0;   ///< r < 1 - clip_low and A < 0
  double clip_high_fraction = 0;  ///< r > 1 + clip_high and A > 0
  double clip_low_min = 0;        ///< smallest over responses of the response's clip_low_fraction
  double clip_high_max = 0;       ///< largest over responses of the response's clip_high_fraction
  double approx_kl = 0;           ///< mean of log old - log pi
  double approx_kl_bounded = 0;   ///< the same after log_ratio_min / log_ratio_max
  double approx_kl_k2 = 0;        ///< mean of (log old - log pi)^2 / 2
  double absolute_log_ratio = 0;  ///< mean of |log old - log pi|
  double ratio_mean = 0;
  double ratio_variance = 0;  ///< biased
  double reference_kl = 0;    ///< the KL term (estimator as configured, ratio weight included)
  double entropy = 0;
  double sequence_weight_mean = 0;  ///< mean over responses of VESPO's phi
};

struct PolicyLossResult {
  double loss = 0;  ///< policy_loss + kl_loss - entropy_bonus
  double policy_loss = 0;
  double kl_loss = 0;               ///< coefficient included
  double entropy_bonus = 0;         ///< coefficient included
  std::vector<double> d_log_probs;  ///< d loss / d log_probs, per position
  std::vector<double> d_entropies;  ///< d loss / d entropies, per position; empty without an entropy bonus
  /// What is aggregated, per position and before its weight; 0 under the mask. Empty for kGeometricMean.
  std::vector<double> token_losses;  ///< policy term with its gates and importance weight
  std::vector<double> token_kl;      ///< KL term without its coefficient; empty when the coefficient is 0
  std::vector<double> ratios;        ///< probability ratio at its level, after the bounds, before ratio_cap
  PolicyLossMetrics metrics;
};

/// Totals and divisor of the aggregation as the objective counts them (see aggregation.h).
AggregationContext scope_totals(const PolicyLossOptions& options, const TokenRows& scope);
double scope_divisor(const PolicyLossOptions& options, const AggregationContext& totals);
/// True when a response with advantages of 0 adds nothing to the gradient, its own or that of others.
bool vanishes_with_advantage(const PolicyLossOptions& options);
/// True when the terms of the loss are divided by different totals, so that parts of a scope cannot be
/// computed before its totals are known.
bool needs_totals(const PolicyLossOptions& options);

/// Computes loss, gradients and metrics. Pure: the same inputs give the same result.
/// With context totals the losses and gradients of the micro-batches of a scope add up to those of the scope.
/// @throws InvalidArgument on missing or wrongly sized inputs, named; dual_clip in (0, 1].
PolicyLossResult policy_loss(const PolicyLossOptions& options, const PolicyLossInputs& inputs);

}  // namespace rlhf::ppo

#pragma once

#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "rlhf/config/field.h"
#include "rlhf/ppo/rows.h"

namespace rlhf::ppo {

/// Largest magnitude of a log ratio that goes into an exponential of a metric or a rejection statistic
/// (verl).
inline constexpr double kSafeLogRatio = 20.0;

/// Unit whose mismatch between trainer and sampler is corrected.
enum class CorrectionLevel {
  kOff,
  kToken,              ///< w_t = pi_old / pi_rollout of the token
  kSequenceProduct,    ///< w = product over the response, the same for all its tokens (verl "sequence")
  kSequenceGeometric,  ///< geometric-mean ratio gates the response, tokens keep their own w_t (OpenRLHF
                       ///< "seq")
};

/// What happens to units whose statistic is out of bounds.
enum class CorrectionMode {
  kTruncate,  ///< w = min(w, upper): TIS
  kClip,      ///< w = clamp(statistic, lower, upper)
  kMask,      ///< w = 0 outside [lower, upper]: IcePop, sequence mask
};

/// The statistic that is held against the bounds.
enum class CorrectionGate {
  kRatio,
  kBinaryKl,  ///< KL of (token, not token) between sampler and trainer
  kTv,        ///< |p_rollout - p_old|
};

struct RolloutCorrectionOptions {
  CorrectionLevel level = CorrectionLevel::kOff;
  CorrectionMode mode = CorrectionMode::kTruncate;
  CorrectionGate gate = CorrectionGate::kRatio;
  double lower = 0;              ///< lower bound of the statistic
  double upper = 2.0;            ///< upper bound of the statistic
  bool batch_normalize = false;  ///< divide the weights by their mean
  double log_ratio_bound = 20;   ///< log-ratios are clamped to +- this before exp; 0 = off
  /// Rejection rules, comma separated: {token, seq_sum, seq_mean}_{k1, k2, k3} or seq_max_{k2, k3}; "" =
  /// none.
  std::string rejection;
  /// One bound per rule, or one for all, comma separated: "upper" or, for k1 rules, "lower_upper" of the
  /// ratio.
  std::string rejection_threshold;
  /// Use the sampler's log-probs as old log-probs and skip the trainer's recomputation.
  bool bypass = false;

  template <class V>
  void visit_fields(V& v) {
    v.choice("level", level,
             {{"off", CorrectionLevel::kOff},
              {"token", CorrectionLevel::kToken},
              {"sequence_product", CorrectionLevel::kSequenceProduct},
              {"sequence_geometric", CorrectionLevel::kSequenceGeometric}},
             "Unit whose mismatch between trainer and sampler is corrected");
    v.choice("mode", mode,
             {{"truncate", CorrectionMode::kTruncate},
              {"clip", CorrectionMode::kClip},
              {"mask", CorrectionMode::kMask}},
             "What happens outside the bounds");
    v.choice("gate", gate,
             {{"ratio", CorrectionGate::kRatio},
              {"binary_kl", CorrectionGate::kBinaryKl},
              {"tv", CorrectionGate::kTv}},
             "Statistic that is held against the bounds");
    v.field("lower", lower, "Lower bound of the statistic", config::at_least(0));
    v.field("upper", upper, "Upper bound of the statistic", config::positive());
    v.field("batch_normalize", batch_normalize, "Divide the weights by their mean over the batch");
    v.field("log_ratio_bound", log_ratio_bound, "Log-ratios are clamped to +- this; 0 = off",
            config::at_least(0));
    v.field("rejection", rejection, "Rejection rules, comma separated, such as seq_mean_k1; empty = none");
    v.field("rejection_threshold", rejection_threshold, "One bound per rejection rule, comma separated");
    v.field("bypass", bypass, "Use the sampler's log-probs as old log-probs");
  }
};

struct RolloutCorrectionInputs {
  TokenRows rows;
  std::span<const double> old_log_probs;  ///< per position: trainer's, under the weights before the update
  std::span<const double> rollout_log_probs;  ///< per position: sampler's
};

struct RolloutCorrectionResult {
  std::vector<double> weights;     ///< per position, 0 under the mask; empty when level is off
  std::vector<std::uint8_t> mask;  ///< per position: the mask after rejection
  double filtered_fraction = 0;    ///< share of units (tokens or responses) outside the bounds
  /// Mismatch between sampler and trainer: kl, k3_kl, chi2_token, chi2_seq, perplexities; with a level the
  /// moments of the weights (rollout_is_*), with rejection those of each rule (rollout_rs_*). Names are
  /// verl's.
  std::map<std::string, double> metrics;
};

/// Corrects for the difference between the policy that sampled and the policy that is trained.
/// @throws InvalidArgument when no token counts, on sizes that do not fit, on malformed rejection rules
/// (named).
RolloutCorrectionResult correct_rollout(const RolloutCorrectionOptions& options,
                                        const RolloutCorrectionInputs& inputs);

}  // namespace rlhf::ppo

#pragma once

// The objectives behind policy_loss(): one function per formula. Internal to rlhf/ppo.

#include <cstddef>
#include <vector>

#include "rlhf/ppo/policy_loss.h"

namespace rlhf::ppo {

/// Probability ratio of every position at the configured level.
struct PolicyRatios {
  std::vector<double> raw_log;      ///< log pi - log old of the token, unbounded
  std::vector<double> bounded_log;  ///< the same after the bounds
  std::vector<double> ratio;        ///< at ratio_level, after the bounds
  std::vector<double> slope;        ///< d ratio-exponent / d unbounded exponent: 1, or 0 where a bound holds
};

/// Loss of one position and how it moves.
struct ObjectiveTerm {
  double value = 0;
  double d_exponent = 0;  ///< d value / d log(ratio at its level)
  double d_log_prob = 0;  ///< d value / d lp that does not go through the ratio
  bool clipped = false;
  bool dual_clipped = false;
};

/// Objectives that need more than their own token.
struct SequenceTerms {
  std::vector<ObjectiveTerm> terms;      ///< per position
  std::vector<double> sequence_weights;  ///< per row; VESPO only
};

/// Clip family, CISPO, SAPO, REINFORCE, DRO and DPPO: one token at a time.
ObjectiveTerm token_objective(const PolicyLossOptions& options, const PolicyLossInputs& inputs,
                              const PolicyRatios& ratios, std::size_t position);
/// Clip-Cov, KL-Cov and VESPO.
SequenceTerms coupled_objective(const PolicyLossOptions& options, const PolicyLossInputs& inputs,
                                const PolicyRatios& ratios);
/// True for the objectives that coupled_objective() serves.
bool is_coupled(PolicyObjective objective);

/// GMPO: fills policy_loss, d_log_probs (policy part) and the clip metrics of `result`.
void geometric_mean_loss(const PolicyLossOptions& options, const PolicyLossInputs& inputs,
                         PolicyLossResult& result);

}  // namespace rlhf::ppo

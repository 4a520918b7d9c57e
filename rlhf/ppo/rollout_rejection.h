#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "rlhf/ppo/rollout_correction.h"

namespace rlhf::ppo {

/// A rule that drops tokens or whole responses whose divergence d = log rollout - log old is too large.
struct RejectionRule {
  enum class Reduction { kToken, kSequenceSum, kSequenceMean, kSequenceMax };
  std::string name;  ///< as configured, such as "seq_mean_k3"
  Reduction reduction = Reduction::kToken;
  int order = 1;     ///< 1: d, 2: d^2 / 2, 3: exp(-d) - 1 + d
  double lower = 0;  ///< of the statistic; only for order 1
  double upper = 0;
};

/// Parses rules and thresholds, both comma separated. @throws InvalidArgument naming the rule or number at
/// fault.
std::vector<RejectionRule> parse_rejection_rules(const std::string& rules, const std::string& thresholds);

/// Returns the mask with rejected tokens cleared, and adds each rule's statistics to `metrics`.
std::vector<std::uint8_t> reject_outliers(const std::vector<RejectionRule>& rules,
                                          const RolloutCorrectionInputs& inputs,
                                          std::map<std::string, double>& metrics);

}  // namespace rlhf::ppo

#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "rlhf/config/field.h"

namespace rlhf::ppo {

/// Length shaping of scores, before baselines and clips.
struct LengthShapingOptions {
  /// Longest response allowed; 0 lets the caller put in the rollout's limit.
  std::size_t max_response_tokens = 0;
  /// Tokens below the limit in which the penalty grows linearly (DAPO eq. 13); 0 = off.
  std::size_t overlong_buffer = 0;
  double overlong_factor = 1.0;  ///< penalty at the limit
  /// Whether a response beyond the limit costs more than the factor (verl's reward manager) or not
  /// (OpenRLHF).
  bool overlong_capped = true;
  /// ProRL: a truncated response's score is multiplied by it (in [0, 1]) or replaced by it (below 0); none =
  /// off.
  std::optional<double> truncated_score;

  template <class V>
  void visit_fields(V& v) {
    v.field("max_response_tokens", max_response_tokens, "Longest response; 0 takes the rollout's limit");
    v.field("overlong_buffer", overlong_buffer, "Tokens below the limit in which the penalty grows; 0 = off");
    v.field("overlong_factor", overlong_factor, "Penalty at the limit", config::at_least(0));
    v.field("overlong_capped", overlong_capped, "Bound the penalty by overlong_factor beyond the limit");
    v.field("truncated_score", truncated_score,
            "Truncated responses: factor of the score in [0, 1], or their score when negative; none = off",
            config::at_most(1));
  }
};

struct LengthShapingInputs {
  std::span<const double> scores;           ///< per response
  std::span<const std::size_t> lengths;     ///< per response, tokens
  std::span<const std::uint8_t> truncated;  ///< per response; only read with truncated_score
};

/// Returns the scores after the overlong penalty, then the truncation rule.
/// @throws InvalidArgument on sizes that do not fit, or a buffer longer than the limit.
std::vector<double> shape_by_length(const LengthShapingOptions& options, const LengthShapingInputs& inputs);

/// The soft overlong penalty of one response of `length` tokens, <= 0.
double overlong_penalty(const LengthShapingOptions& options, std::size_t length);

}  // namespace rlhf::ppo

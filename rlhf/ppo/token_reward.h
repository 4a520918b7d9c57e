#pragma once

#include <optional>
#include <span>
#include <vector>

#include "rlhf/config/field.h"
#include "rlhf/ppo/rows.h"

namespace rlhf::ppo {

/// Which position receives the score of a response.
enum class ScorePlacement {
  kLastToken,  ///< the last token that counts (OpenRLHF, verl)
  kAfterLast,  ///< the slot after the last token where the row has one, else the last token (TRL,
               ///< DeepSpeed-Chat)
};

struct ScoreOptions {
  std::optional<double> clip_min;  ///< scores below are raised to it; none = off
  std::optional<double> clip_max;  ///< scores above are lowered to it; none = off
  std::optional<double>
      missing_eos_penalty;  ///< subtracted from responses that do not end with EOS; none = off

  template <class V>
  void visit_fields(V& v) {
    v.field("clip_min", clip_min, "Lower bound of the score of a response; none = off");
    v.field("clip_max", clip_max, "Upper bound of the score of a response; none = off");
    v.field("missing_eos_penalty", missing_eos_penalty,
            "Taken off the score of a response without EOS; none = off", config::at_least(0));
  }
};

/// Returns the scores after the missing-EOS penalty (`ended` 0) and then the clip, in this order.
/// `ended` may be empty when there is no penalty. @throws InvalidArgument on sizes or a NaN score (row
/// named).
std::vector<double> shape_scores(const ScoreOptions& options, std::span<const double> scores,
                                 std::span<const std::uint8_t> ended);

struct TokenRewardInputs {
  TokenRows rows;
  std::span<const double> scores;  ///< per row
  std::span<const double> kl;      ///< per position, or empty
  double kl_coefficient = 0;       ///< <= 0 counts as 0
  ScorePlacement placement = ScorePlacement::kLastToken;
};

/// Token rewards r_t = -coefficient * kl_t at every position, plus the score at one position of each row.
/// With kAfterLast that position is the first one after the last counting token if the row has it. A row in
/// which no token counts gets its score nowhere under kLastToken. @throws InvalidArgument on sizes that do
/// not fit.
std::vector<double> compute_token_rewards(const TokenRewardInputs& inputs);

/// Position that receives the score of a row, or nothing when no position qualifies.
std::optional<std::size_t> score_position(const TokenRows& rows, std::size_t row, ScorePlacement placement);

}  // namespace rlhf::ppo

#include "rlhf/ppo/token_reward.h"

#include <algorithm>
#include <cmath>

#include "rlhf/core/error.h"

namespace rlhf::ppo {

std::vector<double> shape_scores(const ScoreOptions& options, std::span<const double> scores,
                                 std::span<const std::uint8_t> ended) {
  RLHF_CHECK(!options.missing_eos_penalty || ended.size() == scores.size(),
             "missing-EOS penalty: ", ended.size(), " end flags for ", scores.size(), " scores");
  std::vector<double> shaped(scores.begin(), scores.end());
  for (std::size_t row = 0; row < shaped.size(); ++row) {
    RLHF_CHECK(!std::isnan(shaped[row]), "score of response ", row, " is NaN");
    if (options.missing_eos_penalty && !ended[row]) shaped[row] -= *options.missing_eos_penalty;
    if (options.clip_min) shaped[row] = std::max(shaped[row], *options.clip_min);
    if (options.clip_max) shaped[row] = std::min(shaped[row], *options.clip_max);
  }
  return shaped;
}

std::optional<std::size_t> score_position(const TokenRows& rows, std::size_t row, ScorePlacement placement) {
  std::optional<std::size_t> last;
  for (std::size_t t = rows.end(row); t-- > rows.begin(row);) {
    if (rows.counts(t)) {
      last = t;
      break;
    }
  }
  if (placement == ScorePlacement::kLastToken) return last;
  const std::size_t after = last ? *last + 1 : rows.begin(row);
  return after < rows.end(row) ? std::optional(after) : last;
}

std::vector<double> compute_token_rewards(const TokenRewardInputs& inputs) {
  const TokenRows& rows = inputs.rows;
  check_rows(rows);
  check_row_values(rows, inputs.scores.size(), "token reward scores");
  std::vector<double> rewards(rows.positions(), 0.0);
  if (!inputs.kl.empty()) {
    check_positions(rows, inputs.kl.size(), "token reward KL");
    const double coefficient = std::max(inputs.kl_coefficient, 0.0);
    for (std::size_t t = 0; t < rewards.size(); ++t) rewards[t] = -coefficient * inputs.kl[t];
  }
  for (std::size_t row = 0; row < rows.rows(); ++row) {
    if (const auto position = score_position(rows, row, inputs.placement))
      rewards[*position] += inputs.scores[row];
  }
  return rewards;
}

}  // namespace rlhf::ppo

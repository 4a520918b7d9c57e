#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "rlhf/ppo/options.h"

namespace rlhf::ppo {

/// One finished and scored response of n tokens, as the advantage stage needs it.
struct ScoredResponse {
  std::vector<double> log_probs;            ///< n: policy before the update (anchor of the ratio)
  std::vector<double> reference_log_probs;  ///< n, or empty when no KL is used
  std::vector<double> rollout_log_probs;    ///< n: sampler's, or empty; only read by the rollout correction
  /// n, or n + 1 with a value after the last token, or empty without a critic. TRL has n + 1 wherever the
  /// response is shorter than the limit: the slot after its last token receives the score.
  std::vector<double> values;
  std::vector<std::uint8_t> mask;  ///< n: 1 = chosen by the policy; empty = all
  std::vector<double>
      teacher_log_probs;               ///< n: log-probs of the teacher, or empty; only read by distillation
  std::vector<double> step_rewards;    ///< n, added to the token rewards as they are; empty = none
  std::vector<double> sum_pi_squared;  ///< n, or empty; only read by the token baselines
  double score = 0;                    ///< reward of the response
  double greedy_score = 0;     ///< of the greedy response to the same prompt; only with greedy_baseline
  double bootstrap_value = 0;  ///< value after a truncated response; 0 = the episode ended
  std::uint64_t group = 0;     ///< responses to one prompt share it
  bool ended = true;           ///< ended with EOS (for the missing-EOS penalty)
  bool truncated = false;      ///< stopped by the length limit
  /// No score could be had: nothing is learned from it, and its group's mean takes the place of its score.
  bool unscored = false;
};

/// The rollout batch, ready to be trained on. Token arrays are flat over `offsets`; value arrays over
/// `value_offsets`, whose rows have one more position where ScoredResponse::values had.
struct Experience {
  std::vector<std::size_t> offsets;
  std::vector<std::uint8_t> mask;
  std::vector<double> advantages;
  std::vector<double> old_log_probs;        ///< anchor of the ratio (the sampler's with correction.bypass)
  std::vector<double> rollout_log_probs;    ///< the sampler's; empty when a response has none
  std::vector<double> importance_weights;   ///< empty when there is no correction
  std::vector<double> reference_log_probs;  ///< empty when there is no reference
  std::vector<std::size_t> value_offsets;
  std::vector<std::uint8_t> value_mask;
  std::vector<double> token_rewards;  ///< per value position
  std::vector<double> returns;        ///< per value position
  std::vector<double> old_values;     ///< per value position; empty without a critic
  std::vector<double> scores;         ///< per response, after shaping, penalty and clip
  double mean_kl =
      0;  ///< mean over responses of the summed KL estimate: what the KL controller is updated with
  /// objective/*, advantage/*, rollout_corr/*: see docs/reference/metrics.md.
  std::map<std::string, double> metrics;

  TokenRows rows() const { return {offsets, mask}; }
  TokenRows value_rows() const { return {value_offsets, value_mask}; }
};

/// True when a token of the response enters the loss.
bool has_counting_token(const PpoOptions& options, const ScoredResponse& response);

/// Runs the advantage stage over a whole rollout batch, in this order: length shaping, missing-EOS penalty,
/// score clip (unless after the baseline), sequence KL, group baseline, token rewards, reward whitening,
/// advantages and returns, rollout correction, advantage whitening, sampled distillation. `kl_coefficient` is
/// the controller's current value.
/// @throws InvalidArgument on arrays of the wrong length or a score that is not finite (response named), and
/// when the batch has no token that counts. Unless needs_whole_batch, every group of a batch may also be
/// given on its own, with the same result for its responses.
Experience compute_experience(const PpoOptions& options, double kl_coefficient,
                              std::span<const ScoredResponse> responses);

}  // namespace rlhf::ppo

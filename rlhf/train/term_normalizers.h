#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "reward/scoring/composition.h"
#include "rlhf/ppo/score_normalizer.h"

namespace rlhf {

/// What is learned from the scores of a composition where terms have a normalisation (TermNormalization): the
/// weighted sum of normalised values. Holds the running moments of a stage.
class TermNormalizers {
 public:
  /// @param rules must outlive this, and have all its terms
  explicit TermNormalizers(const RewardComposition& rules);

  /// Whether a term is measured against the whole batch.
  static bool needs_whole_batch(const RewardComposition& rules);

  /// Takes a batch into the running moments. Nothing happens where no term has any.
  void observe(std::span<const Score* const> batch);
  /// Totals of the responses to one prompt. After observe(). A response alone is its own mean: 0.
  std::vector<double> totals(std::span<const Score* const> group, std::int64_t iteration) const;

  /// By place of the term, for checkpoints.
  void save(std::map<std::string, double>& numbers) const;
  void restore(const std::map<std::string, double>& numbers);

 private:
  const RewardComposition* rules_;
  std::vector<ppo::ScoreNormalizer> running_;  ///< one a term
};

}  // namespace rlhf

#pragma once

#include <cstddef>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "reward/scoring/reward_term.h"

namespace rlhf {

/// How one term enters the total: `weight * clamp(score, clip_min, clip_max)`.
struct TermWeight {
  double weight = 1.0;
  double clip_min = -std::numeric_limits<double>::infinity();
  double clip_max = std::numeric_limits<double>::infinity();
};

/// The score of one response. `terms` are raw term scores, in the order of the composition's names.
struct Score {
  double total = 0;
  std::vector<double> terms;
};

/// What one term did over a set of responses.
struct TermStatistics {
  std::string name;
  double mean = 0;    ///< of the raw scores
  double stddev = 0;  ///< of the raw scores, population form
  double min = 0;
  double max = 0;
  double clipped = 0;  ///< share of responses whose score was clipped, in [0, 1]
  double share =
      0;  ///< sum |weighted score| of this term over that of all terms, in [0, 1]; 0 when all are 0
};

/// A weighted sum of reward terms. Not thread-safe while terms are added; `score` is.
class RewardComposition {
 public:
  /// @throws InvalidArgument for a missing term, a name given twice, a weight or clip that is NaN, or
  /// clip_min > clip_max.
  void add(std::unique_ptr<RewardTerm> term, TermWeight weight);

  std::vector<std::string> names() const;
  bool empty() const { return entries_.empty(); }

  /// Scores one response. @throws Error naming term and prompt id when a term throws or returns NaN or
  /// infinity.
  Score score(const ScoredSample& scored) const;

  /// Summarises scores of this composition, one entry a term. Empty input gives zeros.
  std::vector<TermStatistics> summarise(std::span<const Score> scores) const;

 private:
  struct Entry {
    std::unique_ptr<RewardTerm> term;
    TermWeight weight;
  };
  std::vector<Entry> entries_;
};

}  // namespace rlhf

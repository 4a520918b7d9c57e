#pragma once

#include <cstddef>
#include <cstdint>
#include <future>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "reward/scoring/reward_term.h"
#include "reward/scoring/term_options.h"

namespace rlhf {

/// The score of one response. Terms are in the order of the composition's names.
struct Score {
  double total = 0;                       ///< sum of weight * factor * value, not normalised
  std::vector<double> terms = {};         ///< raw scores; failure_score where there was none
  std::vector<double> values = {};        ///< after gates and clips
  std::vector<std::string> reasons = {};  ///< why a term had no score; "" = it had one
  bool dropped = false;                   ///< a term with on_failure: drop had none
};

/// Scores of one response that are under way, term by term; empty = none was begun.
using PendingScore = std::vector<std::shared_future<double>>;

/// What one term did over a set of responses.
struct TermStatistics {
  std::string name;
  double mean = 0;    ///< of the raw scores
  double stddev = 0;  ///< of the raw scores, population form
  double min = 0;
  double max = 0;
  double clipped = 0;  ///< share of responses whose score was clipped, in [0, 1]
  double gated = 0;    ///< share of responses whose gate was closed, in [0, 1]
  double failed = 0;   ///< share of responses without a score, which mean to max leave out, in [0, 1]
  /// sum |weighted value| of this term over that of all terms, in [0, 1]; 0 when all are 0
  double share = 0;
};

/// A weighted sum of reward terms. Not thread-safe while terms are added; `score` is.
///
/// An iteration counts from 1, as in metrics; without one (evaluation), schedules of weights are left out.
/// Normalisation needs more than one response: see TermNormalizers.
class RewardComposition {
 public:
  using Iteration = std::optional<std::int64_t>;

  /// @throws InvalidArgument for a missing term, a name given twice or reserved (total, rules, model), or
  /// options that are not valid.
  void add(std::unique_ptr<RewardTerm> term, TermOptions options);
  /// After all terms are added. @throws InvalidArgument when a gate looks at a term that is not there or at
  /// itself; names those that are.
  void check() const;

  std::vector<std::string> names() const;
  std::size_t size() const { return entries_.size(); }
  bool empty() const { return entries_.empty(); }
  const TermOptions& options(std::size_t term) const { return entries_.at(term).options; }
  /// Whether what is learned differs from the total.
  bool normalizes() const;

  /// weight * factor of a term.
  double weight(std::size_t term, Iteration iteration) const;
  /// Begins what can be scored in the background. `scored` need not live on.
  PendingScore begin(const ScoredSample& scored) const;
  /// Scores one response, which `pending` was begun for. @throws Error naming term and prompt id when a term
  /// throws or returns NaN or infinity; InvalidArgument as check().
  Score score(const ScoredSample& scored, Iteration iteration = {}, const PendingScore& pending = {}) const;

  /// Summarises scores of this composition, one entry a term. Empty input gives zeros.
  std::vector<TermStatistics> summarise(std::span<const Score> scores, Iteration iteration = {}) const;

 private:
  struct Entry {
    std::unique_ptr<RewardTerm> term;
    TermOptions options;
  };
  /// Place of the term that a gate looks at.
  std::size_t gate_of(const Entry& entry) const;
  bool is_gated(const Entry& entry, const std::vector<double>& terms) const;

  std::vector<Entry> entries_;
};

}  // namespace rlhf

#pragma once

#include <span>

#include "rlhf/config/field.h"

namespace rlhf::ppo {

/// What the scores of a run are measured against.
enum class ScoreNormalization {
  kNone,
  kRunning,    ///< (s - mean) / (deviation + 1e-8) over all responses of the run so far, this batch included
  kReference,  ///< s - mean of the first batch, which the policy before the stage has sampled
};

/// Running moments of the scores of a run. Copyable; its state is three numbers.
class ScoreNormalizer {
 public:
  struct State {
    double count = 0;
    double mean = 0;
    double squares = 0;  ///< sum of squared distances from the mean
  };

  explicit ScoreNormalizer(ScoreNormalization kind) : kind_(kind) {}

  /// Takes in a batch: every batch for kRunning, only the first one for kReference.
  /// @throws InvalidArgument on a score that is not finite (its place named)
  void observe(std::span<const double> scores);
  /// The score after normalisation, unchanged for kNone. After observe().
  double normalize(double score) const;
  /// Unbiased deviation of what was observed; 0 below two scores.
  double deviation() const;

  const State& state() const { return state_; }
  void restore(const State& state) { state_ = state; }

 private:
  ScoreNormalization kind_;
  State state_;
};

}  // namespace rlhf::ppo

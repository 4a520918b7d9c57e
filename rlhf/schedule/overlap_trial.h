#pragma once

#include <array>
#include <atomic>
#include <cstdint>

namespace rlhf::schedule {

/// Whether overlapping pays in a mode whose results do not depend on it: both ways are tried, and the faster
/// one is kept. `observe` is called from one thread, `overlaps` from any.
///
/// After the first iteration, which warms up and is not counted, the ways alternate until each was measured
/// kTrials times; from then on the better one runs, without overlap unless that gains kLeastGain, and after
/// kRetry iterations the other one once more. Each time that confirms the choice, the next look comes after
/// twice as many, at most kMostRetry.
class OverlapTrial {
 public:
  static constexpr int kTrials = 3;
  static constexpr double kLeastGain = 0.03;  ///< of the time: less is noise
  static constexpr int kRetry = 12, kMostRetry = 96;

  /// Whether the iteration that runs now may overlap. Changes in `observe` only.
  bool overlaps() const { return overlaps_.load(std::memory_order_relaxed); }
  /// Takes what the iteration that ran has taken for its work, e.g. seconds a token.
  void observe(double seconds_per_work);

 private:
  struct Way {
    double mean = 0;  ///< the last observations weigh most
    int count = 0;
  };
  std::array<Way, 2> ways_;  ///< without and with overlap
  std::int64_t iteration_ = 0;
  int retry_after_ = kRetry, since_retry_ = 0;
  bool better_ = false;  ///< the way that was chosen last
  std::atomic<bool> overlaps_{true};
};

}  // namespace rlhf::schedule

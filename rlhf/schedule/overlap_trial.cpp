#include "rlhf/schedule/overlap_trial.h"

#include <algorithm>

namespace rlhf::schedule {
namespace {

// Of an observation: the mean of the first ones, then a quarter, so that one slow iteration decides nothing.
double weight(int count) {
  return std::max(0.25, 1.0 / count);
}

}  // namespace

void OverlapTrial::observe(double seconds_per_work) {
  if (iteration_++ > 0) {
    Way& way = ways_[overlaps()];
    way.mean += weight(++way.count) * (seconds_per_work - way.mean);
  }
  const auto& [without, with] = ways_;
  if (without.count < kTrials || with.count < kTrials) {
    overlaps_ = with.count < without.count;
    return;
  }
  const bool better = with.mean <= (1 - kLeastGain) * without.mean;
  if (better != better_) retry_after_ = kRetry;
  better_ = better;
  const bool retries = ++since_retry_ >= retry_after_;
  if (retries) {
    since_retry_ = 0;
    retry_after_ = std::min(2 * retry_after_, kMostRetry);
  }
  overlaps_ = better != retries;
}

}  // namespace rlhf::schedule

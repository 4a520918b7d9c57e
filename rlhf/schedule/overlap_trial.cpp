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
  const bool better = with.mean <= without.mean;
  overlaps_ = iteration_ % kRetry == 0 ? !better : better;
}

}  // namespace rlhf::schedule

// Ways of known cost: the cheaper one is found, kept, and left when it becomes the dearer one.
#include "rlhf/schedule/overlap_trial.h"

#include "rlhf/core/random.h"
#include "tests/catch.h"

using rlhf::RandomStream;
using rlhf::schedule::OverlapTrial;

namespace {

// Runs so many iterations and returns how many overlapped.
int run(OverlapTrial& trial, int iterations, double without, double with, RandomStream& random) {
  int overlapped = 0;
  for (int i = 0; i < iterations; ++i) {
    overlapped += trial.overlaps();
    const double noise = 1 + 0.02 * (random.uniform() - 0.5);
    trial.observe(noise * (trial.overlaps() ? with : without));
  }
  return overlapped;
}

}  // namespace

TEST_CASE("the faster way runs in all but a few iterations, and a change is noticed") {
  RandomStream random(3);
  for (const double gain : {0.8, 0.9, 0.99, 1.1, 1.3}) {
    INFO("with overlap " << gain);
    OverlapTrial trial;
    CHECK(trial.overlaps());
    const bool better = gain < 1 - OverlapTrial::kLeastGain;
    run(trial, 1, 1, 100, random);  // a first iteration that is slow for other reasons
    const int first = run(trial, 6, 1, gain, random);
    CHECK(first == OverlapTrial::kTrials);
    const int then = run(trial, 180, 1, gain, random);
    CHECK((better ? 180 - then : then) == 4);  // looks again after 12, 24, 48 and 96 more
    if (gain == 0.99) continue;
    run(trial, 300, gain, 1, random);  // the other one is better now
    const int last = run(trial, 100, gain, 1, random);
    CHECK((better ? last : 100 - last) <= 3);
  }
}

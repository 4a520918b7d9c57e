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
  for (const double gain : {0.8, 0.9, 1.1, 1.3}) {
    INFO("with overlap " << gain);
    OverlapTrial trial;
    CHECK(trial.overlaps());
    const bool better = gain < 1;
    run(trial, 1, 1, 100, random);  // a first iteration that is slow for other reasons
    const int first = run(trial, 5, 1, gain, random);
    CHECK(first >= 2);
    CHECK(first <= 3);
    const int then = run(trial, 120, 1, gain, random);
    CHECK((better ? 120 - then : then) == 10);  // every twelfth looks again
    run(trial, 40, gain, 1, random);            // the other one is better now
    CHECK(trial.overlaps() != better);
  }
}

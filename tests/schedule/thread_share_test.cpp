// Lanes whose work scales with their threads: the split that ends first is found and kept.
#include "rlhf/schedule/thread_share.h"

#include <algorithm>

#include "rlhf/core/random.h"
#include "tests/catch.h"

using rlhf::RandomStream;
using rlhf::schedule::ThreadShare;

TEST_CASE("the split of the cores becomes the one under which both lanes end first, and stays") {
  RandomStream random(7);
  for (const int threads : {2, 3, 8, 16, 64})
    for (int draw = 0; draw < 50; ++draw) {
      const double generate = 0.01 + random.uniform(), train = 0.01 + random.uniform();
      const auto end = [&](int n) { return std::max(generate / n, train / (threads - n)); };
      double best = end(1);
      for (int n = 1; n < threads; ++n) best = std::min(best, end(n));
      ThreadShare share(threads);
      int last = 0;
      for (int iteration = 0; iteration < 2 * threads; ++iteration) {
        CHECK(share.generate() + share.train() == threads);
        last = share.generate();
        share.observe(generate / share.generate(), train / share.train());
      }
      INFO(threads << " threads, work " << generate << " and " << train);
      CHECK(share.generate() == last);
      CHECK(end(last) <= best * (1 + 1e-12));
    }
}

TEST_CASE("two lanes on one core have it each") {
  ThreadShare share(1);
  share.observe(1, 9);
  CHECK(share.generate() == 1);
  CHECK(share.train() == 1);
}

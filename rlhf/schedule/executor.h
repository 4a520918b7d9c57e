#pragma once

#include "rlhf/core/clock.h"
#include "rlhf/schedule/policy.h"
#include "rlhf/schedule/trace.h"

namespace rlhf::schedule {

struct ExecutorOptions {
  std::int64_t first = 0;      ///< iteration to begin with
  std::int64_t last = 0;       ///< iteration to end before
  std::int64_t published = 0;  ///< versions that generation starts from; see Progress
  Clock clock = steady_clock();
  TraceSink sink;  ///< may be empty
};

/// Runs iterations under a policy: the train lane on the calling thread, the generate lane on a second one
/// when the policy overlaps. Returns when all are published.
/// @throws what a workload function throws, after both lanes have come to rest; InternalError when the policy
/// breaks the task graph or both lanes wait.
void run(const Policy& policy, Workload& workload, const ExecutorOptions& options);

}  // namespace rlhf::schedule

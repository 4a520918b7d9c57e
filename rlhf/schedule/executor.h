#pragma once

#include <functional>

#include "rlhf/core/clock.h"
#include "rlhf/schedule/policy.h"

namespace rlhf::schedule {

/// One stretch of work or of waiting of a lane, for traces.
struct TraceEvent {
  Lane lane = Lane::kGenerate;
  bool waiting = false;  ///< the lane had nothing it was allowed to do; `task` has no meaning
  Task task = Task::kGenerate;
  std::int64_t iteration = 0;  ///< that the work, or the awaited work, belongs to
  double begin_s = 0;          ///< on the executor's clock
  double end_s = 0;
  std::size_t num_samples = 0;  ///< samples finished or scored; 0 for the other tasks
  std::int64_t version = 0;     ///< of the published weights when it began
};
/// Called from both lanes, one call at a time.
using TraceSink = std::function<void(const TraceEvent&)>;

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

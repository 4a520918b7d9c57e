#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "rlhf/schedule/workload.h"

namespace rlhf::schedule {

/// One stretch of work or of waiting of a lane.
struct TraceEvent {
  Lane lane = Lane::kGenerate;
  bool waiting = false;  ///< the lane had nothing it was allowed to do; `task` is what it waited to begin
  Task task = Task::kGenerate;
  std::int64_t iteration = 0;  ///< that the work, or the awaited work, belongs to
  double begin_s = 0;          ///< on the executor's clock
  double end_s = 0;
  std::size_t num_samples = 0;  ///< samples finished or scored; 0 for the other tasks
  std::int64_t version = 0;     ///< of the published weights when it began
};
/// Called from both lanes, one call at a time.
using TraceSink = std::function<void(const TraceEvent&)>;

}  // namespace rlhf::schedule

#pragma once

#include <memory>
#include <string_view>

#include "rlhf/schedule/recorder.h"

namespace rlhf::schedule {

/// Decides in which order, and beside what, the tasks of an iteration run.
class Policy {
 public:
  virtual ~Policy() = default;
  virtual std::string_view name() const = 0;
  /// Runs one iteration to its end. @throws whatever a task throws; the iteration is then abandoned.
  virtual void run(Recorder& recorder) = 0;
};

/// Phase after phase on the calling thread: the reference for every other policy.
class SerialPolicy : public Policy {
 public:
  std::string_view name() const override { return "serial"; }
  void run(Recorder& recorder) override;
};

/// Runs one iteration of `tasks` under a policy and returns its times. `sink` may be empty.
IterationTimes run_iteration(Policy& policy, IterationTasks& tasks, std::int64_t iteration,
                             const Clock& clock, const TraceSink& sink);

}  // namespace rlhf::schedule

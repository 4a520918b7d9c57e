#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <vector>

#include "rlhf/core/clock.h"
#include "rlhf/schedule/task.h"

namespace rlhf::schedule {

/// One stretch of work, for traces.
struct TraceEvent {
  Task task = Task::kGenerate;
  std::int64_t iteration = 0;
  double begin_s = 0;  ///< on the recorder's clock
  double end_s = 0;
  std::size_t num_samples = 0;  ///< samples finished or scored; 0 for the other tasks
};
using TraceSink = std::function<void(const TraceEvent&)>;

/// Seconds of one iteration. With overlapping policies the sum over tasks can exceed `wall_s`.
struct IterationTimes {
  double wall_s = 0;
  std::array<double, kAllTasks.size()> task_s{};
  double seconds(Task task) const { return task_s[static_cast<std::size_t>(task)]; }
};

/// Stands between a policy and the tasks: times every call, and checks it against the task graph, so that a
/// policy with a wrong order stops at once instead of training on unfinished data. One object an iteration.
class Recorder {
 public:
  /// `tasks` must outlive the recorder; `sink` may be empty.
  Recorder(IterationTasks& tasks, std::int64_t iteration, Clock clock, TraceSink sink);

  std::size_t num_samples() const { return finished_.size(); }
  std::size_t num_optimizer_steps() const { return num_steps_; }
  std::size_t num_micro_batches(std::size_t step) const { return tasks_.num_micro_batches(step); }

  /// Each runs the task of that name. @throws InternalError when the graph does not allow it now, or when
  /// `generate` returns no sample, one that does not exist, or one twice; and whatever the task throws.
  std::vector<SampleIndex> generate();
  void score(std::span<const SampleIndex> samples);
  void compute_advantages();
  void train(std::size_t step, std::size_t micro_batch);
  void optimize(std::size_t step);
  void publish();

  std::size_t num_finished() const { return num_finished_; }
  /// Ends the iteration. @throws InternalError unless everything ran.
  IterationTimes finish();

 private:
  template <class Call>
  void timed(Task task, std::size_t num_samples, Call call);
  void record(Task task, double begin_s, std::size_t num_samples);

  IterationTasks& tasks_;
  std::int64_t iteration_;
  Clock clock_;
  TraceSink sink_;
  double begin_s_;
  IterationTimes times_;

  std::vector<std::uint8_t> finished_;
  std::vector<std::uint8_t> scored_;
  std::size_t num_finished_ = 0;
  std::size_t num_scored_ = 0;
  bool has_advantages_ = false;
  std::size_t num_steps_ = 0;
  std::size_t next_step_ = 0;
  std::size_t next_micro_batch_ = 0;
  bool published_ = false;
};

}  // namespace rlhf::schedule

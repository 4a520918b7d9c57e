#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <vector>

#include "rlhf/schedule/workload.h"

namespace rlhf::schedule {

/// One call of a workload function.
struct Action {
  Task task = Task::kGenerate;
  std::int64_t iteration = 0;        ///< kGenerate: the last iteration whose prompts may enter
  std::vector<SampleIndex> samples;  ///< kScore, kAdvantage
  std::size_t step = 0;              ///< kTrain, kOptimize
  std::size_t micro_batch = 0;       ///< kTrain
};

/// What has been done in a run, and what the task graph allows next: the state that policies decide on. Knows
/// nothing of threads or time, so that the same code runs under the executor, the simulator and tests that
/// try every order.
///
/// Iterations count over the run. `generated() == k` means that the samples of iterations 0 .. k-1 are
/// complete; trained() and published() likewise. Weights that were published k times have version k.
class Progress {
 public:
  /// One iteration whose samples are not all trained yet.
  struct Iteration {
    std::vector<SampleIndex> arrived;  ///< in the order in which they finished
    std::size_t num_scored = 0;        ///< the first of `arrived`
    std::size_t num_advantaged = 0;    ///< the first of `arrived`
    std::size_t step = 0;              ///< the optimizer step that is being worked on
    std::size_t num_ready = 0;         ///< micro-batches of `step` that may be trained
    std::size_t num_trained = 0;       ///< micro-batches of `step`
  };

  /// The workload must outlive it. A run of iterations first .. last-1. `published` is first, or less when
  /// generation lags behind.
  Progress(const Workload& workload, std::int64_t first, std::int64_t last, std::int64_t published);

  std::int64_t last() const { return last_; }
  std::int64_t generated() const { return generated_; }
  std::int64_t trained() const { return trained_; }
  std::int64_t published() const { return published_; }
  bool done() const { return published_ == last_; }

  std::size_t num_samples() const { return num_samples_; }
  std::size_t num_optimizer_steps() const { return num_steps_; }
  bool needs_whole_batch() const { return whole_batch_; }
  bool overlap_pays() const { return workload_->overlap_pays(); }
  /// The iteration that is trained now, number trained(). Empty state when none of its samples has come.
  const Iteration& current() const;
  /// Samples that have finished, of all iterations that are not trained yet.
  std::map<std::int64_t, std::set<SampleIndex>> arrived() const;
  bool is_complete(const Iteration& iteration) const { return iteration.arrived.size() == num_samples_; }

  /// Checks an action against the task graph before it runs. @throws InternalError naming what is wrong.
  void check(const Action& action) const;
  /// Records that an action has run. `num_ready`: what num_micro_batches says after kAdvantage and kOptimize.
  void record(const Action& action, std::size_t num_ready);
  /// Records samples that kGenerate returned. @throws InternalError for a sample that does not exist, came
  /// twice, or belongs to an iteration that was not allowed to start.
  void record_samples(const Action& generate, const std::vector<FinishedSample>& finished);

 private:
  const Workload* workload_;
  std::int64_t last_, generated_, trained_, published_;
  std::size_t num_samples_, num_steps_;
  bool whole_batch_;
  std::map<std::int64_t, Iteration> iterations_;
};

}  // namespace rlhf::schedule

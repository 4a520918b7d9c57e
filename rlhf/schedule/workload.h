#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace rlhf::schedule {

/// The tasks of one iteration. Edges of the graph: a sample is generated, then scored; its advantages need
/// the scores of its group, or of the whole batch; a micro-batch needs its advantages; an optimizer step
/// needs the whole batch generated and all its micro-batches trained; an iteration is finished after its last
/// optimizer step, then its weights are published; generation reads the weights that were published last.
enum class Task { kGenerate, kScore, kAdvantage, kTrain, kOptimize, kFinish, kPublish };
inline constexpr std::array<Task, 7> kAllTasks = {Task::kGenerate, Task::kScore,    Task::kAdvantage,
                                                  Task::kTrain,    Task::kOptimize, Task::kFinish,
                                                  Task::kPublish};
/// Returns "generate", "score", "advantage", "train", "optimize", "finish" or "publish".
const char* to_string(Task task);

/// A worker with threads of its own. Generation runs on one, everything else on the other.
enum class Lane { kGenerate, kTrain };
inline constexpr std::array<Lane, 2> kAllLanes = {Lane::kGenerate, Lane::kTrain};
/// Returns "generate" or "train".
const char* to_string(Lane lane);
inline Lane lane_of(Task task) {
  return task == Task::kGenerate ? Lane::kGenerate : Lane::kTrain;
}

/// Names a sample within one iteration: its place in the batch, from 0.
using SampleIndex = std::size_t;
struct FinishedSample {
  std::int64_t iteration = 0;
  SampleIndex sample = 0;
};

/// Where the seconds of one iteration went, from the end of the iteration before to its own.
struct IterationTimes {
  double wall_s = 0;
  std::array<double, kAllTasks.size()> task_s{};  ///< with overlap the sum can exceed wall_s
  std::array<double, kAllLanes.size()> wait_s{};  ///< a lane had nothing it was allowed to do
  double seconds(Task task) const { return task_s[static_cast<std::size_t>(task)]; }
  double waited(Lane lane) const { return wait_s[static_cast<std::size_t>(lane)]; }
};

/// What an algorithm does. The executor calls these functions in an order that the task graph allows:
/// `generate` on the generate lane, all others on the train lane, which is the thread that called `run`. The
/// two lanes run at the same time when the policy overlaps; calls of one lane never do.
class Workload {
 public:
  virtual ~Workload() = default;

  /// Samples of a batch.
  virtual std::size_t num_samples() const = 0;
  /// Optimizer steps on a batch (epochs x mini-batches).
  virtual std::size_t num_optimizer_steps() const = 0;
  /// True when advantages need the whole batch: then nothing is trained before its last sample has come.
  virtual bool needs_whole_batch() const = 0;
  /// Whether a policy whose results do not depend on it should overlap in the iteration that runs. Asked from
  /// both lanes; changes only where an iteration finishes.
  virtual bool overlap_pays() const { return true; }

  /// Decodes for a short while and returns the samples that have finished, each once, a group at a time. The
  /// prompts of iterations up to `last_iteration` may enter; the first call that names an iteration starts
  /// it.
  virtual std::vector<FinishedSample> generate(std::int64_t last_iteration) = 0;
  /// Scores finished samples: rewards, reference log-probs, values.
  virtual void score(std::int64_t iteration, std::span<const SampleIndex> samples) = 0;
  /// Computes advantages and returns of scored samples, whole groups in the order in which they finished; of
  /// all samples at once when needs_whole_batch.
  virtual void compute_advantages(std::int64_t iteration, std::span<const SampleIndex> samples) = 0;
  /// Micro-batches of an optimizer step that can be trained now. Those of the first step may become more as
  /// long as the batch is incomplete. Asked on the train lane.
  virtual std::size_t num_micro_batches(std::int64_t iteration, std::size_t step) const = 0;
  /// Forward and backward of one micro-batch; gradients add up.
  virtual void train(std::int64_t iteration, std::size_t step, std::size_t micro_batch) = 0;
  /// Clips gradients and steps the optimizer.
  virtual void optimize(std::int64_t iteration, std::size_t step) = 0;
  /// Reports the iteration and keeps a checkpoint of it. What it throws ends the run, e.g. a stop on request.
  virtual void finish(std::int64_t iteration, const IterationTimes& times) = 0;
  /// Makes the weights as they are now those that generation reads from its next decode step on.
  virtual void publish(std::int64_t iteration) = 0;

  /// Called when lanes become busy or idle, from either lane, one call at a time: the place to share threads
  /// out. Must not block.
  virtual void lanes_changed(bool /*generate_busy*/, bool /*train_busy*/) {}
};

}  // namespace rlhf::schedule

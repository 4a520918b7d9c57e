#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace rlhf::schedule {

/// The tasks of one iteration. Edges of the graph: a sample is generated, then scored; advantages need the
/// scores of the samples they cover; a micro-batch needs its advantages; an optimizer step needs all its
/// micro-batches; publishing needs the last optimizer step; generation reads the weights that were published
/// last.
enum class Task { kGenerate, kScore, kAdvantage, kTrain, kOptimize, kPublish };
inline constexpr std::array<Task, 6> kAllTasks = {Task::kGenerate, Task::kScore,    Task::kAdvantage,
                                                  Task::kTrain,    Task::kOptimize, Task::kPublish};
/// Returns "generate", "score", "advantage", "train", "optimize" or "publish".
const char* to_string(Task task);

/// Names a sample within one iteration: its place in the batch, from 0.
using SampleIndex = std::size_t;

/// What an algorithm does in one iteration. A policy calls these functions in an order that the task graph
/// allows; under the serial policy all calls come from one thread.
class IterationTasks {
 public:
  virtual ~IterationTasks() = default;

  /// Samples in the batch.
  virtual std::size_t num_samples() const = 0;
  /// Optimizer steps on this batch (epochs x mini-batches).
  virtual std::size_t num_optimizer_steps() const = 0;
  /// Micro-batches of one optimizer step. Asked after the advantages are there.
  virtual std::size_t num_micro_batches(std::size_t step) const = 0;

  /// Goes on decoding until at least one more sample has finished, and returns the finished ones, each sample
  /// once over the iteration. Called until all samples have come.
  virtual std::vector<SampleIndex> generate() = 0;
  /// Scores finished samples: rewards, reference log-probs, values.
  virtual void score(std::span<const SampleIndex> samples) = 0;
  /// Computes token rewards, advantages and returns of the whole batch.
  virtual void compute_advantages() = 0;
  /// Forward and backward of one micro-batch; gradients add up.
  virtual void train(std::size_t step, std::size_t micro_batch) = 0;
  /// Clips gradients and steps the optimizer.
  virtual void optimize(std::size_t step) = 0;
  /// Makes the new weights those that generation reads.
  virtual void publish() = 0;
};

}  // namespace rlhf::schedule

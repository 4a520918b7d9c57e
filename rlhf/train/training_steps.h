#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "rlhf/train/optimizer.h"
#include "rlhf/train/stage.h"

namespace rlhf {

/// A stage that goes over data in optimizer steps.
struct TrainingPlan {
  std::string stage;
  std::string model = "policy";  ///< name of what learns, in checkpoints
  std::size_t num_items = 0;
  std::int64_t items_per_step = 1;
  double epochs = 1;           ///< passes over the items; used when max_steps is 0
  std::int64_t max_steps = 0;  ///< 0 = as epochs says
  OptimizerOptions optimizer = {};

  std::int64_t num_steps() const;
};

/// What one step has measured.
struct StepMeasure {
  double loss = 0;
  Metrics metrics;          ///< beside the loss
  std::int64_t tokens = 0;  ///< that were computed, prompts included
};

/// Adds the gradient of the step with these items to the weights' gradient; with several ranks each adds a
/// part of it (own_passes), and measures the whole. `step` counts from 1.
using TrainStep = std::function<StepMeasure(const std::vector<std::size_t>& items, std::int64_t step)>;

/// Runs a plan: items in shuffled order, one AdamW update a step, metrics, checkpoints; goes on where an
/// earlier run was stopped. @throws StageStopped, Error naming the step when the loss is not finite.
void run_steps(Parameters<float>& parameters, const TrainingPlan& plan, const StageContext& context,
               const TrainStep& train);

}  // namespace rlhf

#include "rlhf/train/training_steps.h"

#include <cmath>

#include "rlhf/core/error.h"
#include "rlhf/train/batching.h"
#include "rlhf/train/checkpoint.h"

namespace rlhf {

std::int64_t TrainingPlan::num_steps() const {
  if (max_steps > 0) return max_steps;
  const double per_epoch = static_cast<double>(num_items) / static_cast<double>(items_per_step);
  return static_cast<std::int64_t>(std::ceil(epochs * per_epoch));
}

void run_steps(Parameters<float>& parameters, const TrainingPlan& plan, const StageContext& context,
               const TrainStep& train) {
  const std::int64_t steps = plan.num_steps();
  Optimizer<float> optimizer(plan.optimizer, parameters.num_trainable(), *context.collective,
                             context.moments);
  StageCheckpoint checkpoint(context, plan.stage, {{plan.model, &parameters, &optimizer}});
  std::map<std::string, double> numbers;
  std::int64_t step = checkpoint.restore(numbers);
  context.observer->stage_begin(plan.stage, steps);
  for (; step < steps; ++step) {
    Stopwatch watch;
    const auto items =
        step_items(plan.num_items, static_cast<std::size_t>(plan.items_per_step), step, context.seed);
    const StepMeasure measure = train(items, step + 1);
    if (!std::isfinite(measure.loss))
      fail<Error>(plan.stage, ": the loss of step ", step + 1, " is ", measure.loss);
    const double learning_rate = plan.optimizer.learning_rate *
                                 learning_rate_factor(plan.optimizer.schedule, static_cast<std::size_t>(step),
                                                      static_cast<std::size_t>(steps));
    const auto update = optimizer.step(context.compute, parameters, learning_rate);
    const double seconds = watch.seconds(), tokens = static_cast<double>(measure.tokens);
    Metrics metrics = {{"loss", measure.loss}};
    metrics.insert(metrics.end(), measure.metrics.begin(), measure.metrics.end());
    const Metrics rest = {{"learning_rate", learning_rate},
                          {"gradient_norm", update.gradient_norm},
                          {"tokens", tokens},
                          {"tokens_per_s", tokens / seconds},
                          {"seconds", seconds}};
    metrics.insert(metrics.end(), rest.begin(), rest.end());
    context.observer->step(plan.stage, step + 1, steps, metrics);
    checkpoint.after_step(step + 1, steps, numbers);
  }
  checkpoint.remove();
}

}  // namespace rlhf

#include "rlhf/train/sft.h"

#include "rlhf/core/error.h"
#include "rlhf/train/example_pass.h"
#include "rlhf/train/training_steps.h"

namespace rlhf {

void run_sft(LanguageModel& model, const std::vector<TrainingExample>& examples, const SftOptions& options,
             const std::string& stage, const StageContext& context) {
  RLHF_CHECK(!examples.empty(), stage, ": there are no examples");
  for (const TrainingExample& example : examples)
    RLHF_CHECK(static_cast<std::int64_t>(example.tokens.size()) <= model.config().max_positions, stage,
               ": an example has ", example.tokens.size(), " tokens, the model's context is ",
               model.config().max_positions);
  Parameters<float>& parameters = model.parameters();
  SequencePass<float> pass(model.config(), context.compute, context.recompute);
  TrainingPlan plan{stage};
  plan.num_items = examples.size();
  plan.items_per_step = options.examples_per_step;
  plan.epochs = options.epochs;
  plan.max_steps = options.max_steps;
  plan.optimizer = options.optimizer;
  run_steps(parameters, plan, context, [&](const std::vector<std::size_t>& items, std::int64_t step) {
    ExampleBatch batch;
    StepMeasure measure;
    double loss_tokens = 0, sum = 0;
    for (std::size_t item : items) {
      batch.examples.push_back(&examples[item]);
      measure.tokens += static_cast<std::int64_t>(examples[item].tokens.size());
      loss_tokens += static_cast<double>(count_loss_tokens(examples[item]));
    }
    RLHF_CHECK(loss_tokens > 0, stage, ": no token of step ", step, " carries loss");
    add_gradient(pass, parameters.weights(), batch, {options.max_tokens_per_micro_batch, context.collective},
                 LossScope::kMicroBatch, [&](const TokenLogProbs& log_probs) {
                   for (double log_prob : log_probs.values) sum -= log_prob;
                   return std::vector<double>(log_probs.values.size(), -1 / loss_tokens);
                 });
    context.collective->all_reduce(std::span(&sum, 1));
    measure.loss = sum / loss_tokens;
    return measure;
  });
}

}  // namespace rlhf

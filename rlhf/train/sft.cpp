#include "rlhf/train/sft.h"

#include <cmath>

#include "rlhf/core/error.h"
#include "rlhf/model/sequence_pass.h"
#include "rlhf/train/batching.h"
#include "rlhf/train/checkpoint.h"

namespace rlhf {
namespace {

using Pass = SequencePass<float>;

std::int64_t count_loss_tokens(const TrainingExample& example) {
  std::int64_t count = 0;
  for (std::size_t t = 1; t < example.tokens.size(); ++t) count += example.loss_mask[t];
  return count;
}

// Sum of negative log-likelihoods of one micro-batch; adds the gradient of that sum / loss_tokens.
double train_micro_batch(Pass& pass, const DecoderWeights<float>& weights,
                         const std::vector<const TrainingExample*>& examples, std::int64_t loss_tokens) {
  std::vector<std::span<const TokenId>> sequences;
  for (const TrainingExample* example : examples) sequences.push_back(example->tokens);
  const PackedRows rows(sequences);
  std::vector<TokenTarget> targets;
  for (std::size_t s = 0; s < examples.size(); ++s)
    for (std::size_t t = 1; t < examples[s]->tokens.size(); ++t)
      if (examples[s]->loss_mask[t])
        targets.push_back({rows.row(s, static_cast<std::int64_t>(t) - 1), examples[s]->tokens[t]});
  std::vector<float> logprobs(targets.size());
  const std::vector<float> gradient(targets.size(), -1.0f / static_cast<float>(loss_tokens));
  pass.forward(weights, rows, Pass::Keep::kForBackward);
  pass.token_logprobs(weights, targets, 1, logprobs, {});
  pass.token_logprobs_backward(weights, targets, 1, gradient, {});
  pass.backward(weights, rows);
  double sum = 0;
  for (float logprob : logprobs) sum -= static_cast<double>(logprob);
  return sum;
}

}  // namespace

void run_sft(LanguageModel& model, const std::vector<TrainingExample>& examples, const SftOptions& options,
             const std::string& stage, const StageContext& context) {
  RLHF_CHECK(!examples.empty(), stage, ": there are no examples");
  for (const TrainingExample& example : examples)
    RLHF_CHECK(static_cast<std::int64_t>(example.tokens.size()) <= model.config().max_positions, stage,
               ": an example has ", example.tokens.size(), " tokens, the model's context is ",
               model.config().max_positions);
  const double per_epoch =
      static_cast<double>(examples.size()) / static_cast<double>(options.examples_per_step);
  const std::int64_t steps = options.max_steps > 0
                                 ? options.max_steps
                                 : static_cast<std::int64_t>(std::ceil(options.epochs * per_epoch));
  Parameters<float>& parameters = model.parameters();
  Optimizer<float> optimizer(options.optimizer, parameters.trainable().size());
  StageCheckpoint checkpoint(context, stage, {{"policy", &parameters, &optimizer}});
  std::map<std::string, double> numbers;
  std::int64_t step = checkpoint.restore(numbers);
  Pass pass(model.config(), context.compute);
  context.observer->stage_begin(stage, steps);

  for (; step < steps; ++step) {
    Stopwatch watch;
    const auto items =
        step_items(examples.size(), static_cast<std::size_t>(options.examples_per_step), step, context.seed);
    std::vector<std::span<const TokenId>> sequences;
    std::int64_t loss_tokens = 0, tokens = 0;
    for (std::size_t item : items) {
      sequences.push_back(examples[item].tokens);
      tokens += static_cast<std::int64_t>(examples[item].tokens.size());
      loss_tokens += count_loss_tokens(examples[item]);
    }
    RLHF_CHECK(loss_tokens > 0, stage, ": no token of step ", step + 1, " carries loss");
    double loss = 0;
    for (const auto& batch : split_into_passes(sequences, options.max_tokens_per_micro_batch)) {
      std::vector<const TrainingExample*> chosen;
      for (std::size_t i : batch) chosen.push_back(&examples[items[i]]);
      loss += train_micro_batch(pass, parameters.weights(), chosen, loss_tokens);
    }
    loss /= static_cast<double>(loss_tokens);
    if (!std::isfinite(loss)) fail<Error>(stage, ": the loss of step ", step + 1, " is ", loss);
    const double learning_rate =
        options.optimizer.learning_rate * learning_rate_factor(options.optimizer.schedule,
                                                               static_cast<std::size_t>(step),
                                                               static_cast<std::size_t>(steps));
    const auto update = optimizer.step(context.compute, parameters, learning_rate);
    const double seconds = watch.seconds();
    context.observer->step(stage, step + 1, steps,
                           {{"loss", loss},
                            {"learning_rate", learning_rate},
                            {"gradient_norm", update.gradient_norm},
                            {"tokens", static_cast<double>(tokens)},
                            {"tokens_per_s", static_cast<double>(tokens) / seconds},
                            {"seconds", seconds}});
    checkpoint.after_step(step + 1, steps, numbers);
  }
  checkpoint.remove();
}

}  // namespace rlhf

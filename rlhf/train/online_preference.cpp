#include "rlhf/train/online_preference.h"

#include <cmath>

#include "rlhf/core/error.h"
#include "rlhf/train/checkpoint.h"

namespace rlhf {
namespace {
constexpr const char* kStage = "online_preference";
}

OnlinePreference::OnlinePreference(LanguageModel& policy, const Parameters<float>* reference,
                                   const Parameters<float>* reward_model, const TaskData& data,
                                   const RolloutOptions& rollout, const OnlinePreferenceOptions& options,
                                   const StageContext& context)
    : options_(options),
      context_(context),
      policy_(policy.parameters()),
      reference_(reference),
      pass_(policy.config(), context.compute, context.recompute),
      loss_(options.loss, {options.max_tokens_per_micro_batch, context.collective}, pass_),
      optimizer_(options.optimizer, policy_.num_trainable(), *context.collective, context.moments),
      sampler_(kStage, policy, reward_model, data, rollout, options.sampler, context) {
  RLHF_CHECK(reference || !ppo::needs_reference(options.loss), kStage,
             ": the loss compares with a reference but there is no reference model");
}

void OnlinePreference::run() {
  StageCheckpoint checkpoint(context_, kStage, {{"policy", &policy_, &optimizer_}});
  std::map<std::string, double> numbers;
  const std::int64_t first = checkpoint.restore(numbers), last = options_.iterations;
  context_.observer->stage_begin(kStage, last);
  for (std::int64_t iteration = first; iteration < last; ++iteration) {
    Stopwatch watch;
    const auto groups = sampler_.sample(iteration, options_.prompts_per_step);
    const PairMeasure pairs = train(groups);
    if (!std::isfinite(pairs.loss))
      fail<Error>(kStage, ": the loss of iteration ", iteration + 1, " is ", pairs.loss);
    const double learning_rate =
        options_.optimizer.learning_rate * learning_rate_factor(options_.optimizer.schedule,
                                                                static_cast<std::size_t>(iteration),
                                                                static_cast<std::size_t>(last));
    Metrics metrics = sampler_.metrics(groups);
    metrics.emplace_back("pairs", static_cast<double>(pairs.pairs));
    if (pairs.pairs > 0) {
      const auto update = optimizer_.step(context_.compute, policy_, learning_rate);
      metrics.emplace_back("loss", pairs.loss);
      for (const auto& metric : pairs.metrics()) metrics.push_back(metric);
      metrics.emplace_back("gradient_norm", update.gradient_norm);
    }
    metrics.emplace_back("learning_rate", learning_rate);
    metrics.emplace_back("seconds", watch.seconds());
    context_.observer->step(kStage, iteration + 1, last, metrics);
    checkpoint.after_step(iteration + 1, last, numbers);
  }
  checkpoint.remove();
}

// Adds the gradient of the iteration's pairs.
PairMeasure OnlinePreference::train(const std::vector<ResponseGroup>& groups) {
  std::vector<TrainingPair> pairs;
  for (const ResponseGroup& group : groups) {
    const GroupResponse &best = best_of(group), &worst = worst_of(group);
    if (best.score > worst.score)
      pairs.push_back({to_example(best), to_example(worst), best.score - worst.score, best.prompt->task});
  }
  if (pairs.empty()) return {};
  std::vector<const TrainingPair*> pointers;
  for (const TrainingPair& pair : pairs) pointers.push_back(&pair);
  const DecoderWeights<float>& weights = policy_.weights();
  return loss_.train(loss_.refer(pointers, reference_ ? reference_->weights() : weights), weights);
}

}  // namespace rlhf

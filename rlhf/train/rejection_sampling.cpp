#include "rlhf/train/rejection_sampling.h"

#include <algorithm>

#include "rlhf/core/error.h"
#include "rlhf/train/checkpoint.h"

namespace rlhf {
namespace {
constexpr const char* kRejectionStage = "rejection_sampling";
}

RejectionSampling::RejectionSampling(LanguageModel& policy, const Parameters<float>* reward_model,
                                     const TaskData& data, const RolloutOptions& rollout,
                                     const RejectionSamplingOptions& options, const StageContext& context)
    : policy_(policy),
      options_(options),
      context_(context),
      sampler_(kRejectionStage, policy, reward_model, data, rollout, options.sampler, context) {}

void RejectionSampling::run() {
  // The weights at the start of an iteration; the SFT inside it has a checkpoint of its own.
  StageCheckpoint checkpoint(context_, kRejectionStage, {{"policy", &policy_.parameters(), nullptr}});
  std::map<std::string, double> numbers;
  const std::int64_t first = checkpoint.restore(numbers), last = options_.iterations;
  for (std::int64_t iteration = first; iteration < last; ++iteration) {
    context_.observer->stage_begin(kRejectionStage, last);
    const auto groups = sampler_.sample(iteration, options_.prompts_per_iteration);
    const std::vector<TrainingExample> examples = choose(groups, iteration);
    run_sft(policy_, examples, options_.sft, concat(kRejectionStage, ".", iteration + 1), context_);
    Metrics metrics = sampler_.metrics(groups);
    metrics.emplace_back("kept", static_cast<double>(examples.size()));
    context_.observer->stage_begin(kRejectionStage, last);
    context_.observer->step(kRejectionStage, iteration + 1, last, metrics);
    if (iteration + 1 < last) checkpoint.write(iteration + 1, numbers);
    if (iteration + 1 < last && context_.stop_requested()) throw StageStopped();
  }
  checkpoint.remove();
}

std::vector<TrainingExample> RejectionSampling::choose(const std::vector<ResponseGroup>& groups,
                                                       std::int64_t iteration) const {
  std::vector<TrainingExample> examples;
  double best = -std::numeric_limits<double>::infinity();
  const auto add = [&](const GroupResponse& response) {
    best = std::max(best, response.score);
    if (!options_.min_score || response.score >= *options_.min_score)
      examples.push_back(to_example(response));
  };
  for (const ResponseGroup& group : groups) {
    if (options_.keep == KeptResponses::kBest)
      add(best_of(group));
    else
      std::ranges::for_each(group, add);
  }
  if (examples.empty())
    fail<Error>(kRejectionStage, ": iteration ", iteration + 1,
                ": no response reached rejection_sampling.min_score = ", *options_.min_score,
                "; the best one has ", best);
  return examples;
}

}  // namespace rlhf

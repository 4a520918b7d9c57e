#include "rlhf/train/ppo_trainer.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "rlhf/core/clock.h"
#include "rlhf/core/error.h"
#include "rlhf/schedule/policy.h"

namespace rlhf {
namespace {

// What fn returns; an error of it is thrown on with the number of the iteration before its message.
template <class Fn>
auto in_iteration(std::int64_t number, const Fn& fn) {
  try {
    return fn();
  } catch (const Error& error) {
    fail<Error>("ppo: iteration ", number, ": ", error.what());
  }
}

}  // namespace

PpoTrainer::PpoTrainer(LanguageModel& policy, const FrozenModels& frozen, const PpoSetting& setting)
    : setting_(setting),
      models_(policy, frozen, setting.data, setting.rollout, setting.options, setting.context),
      kl_(setting.options.algorithm.kl.controller, setting.options.algorithm.kl.coefficient) {}

void PpoTrainer::run() {
  std::vector<LearningModel> learning = {{"policy", &models_.policy.parameters(), &models_.policy_optimizer}};
  if (models_.critic) learning.push_back({"value", &*models_.critic, &*models_.critic_optimizer});
  StageCheckpoint checkpoint(setting_.context, "ppo", learning);
  std::map<std::string, double> numbers = {{"kl_coefficient", kl_.coefficient()}};
  std::int64_t done = checkpoint.restore(numbers);
  kl_.restore(numbers["kl_coefficient"]);

  schedule::SerialPolicy schedule;
  setting_.context.observer->stage_begin("ppo", setting_.options.iterations);
  for (; done < setting_.options.iterations; ++done) {
    PpoIteration iteration(setting_, models_, kl_, done);
    const auto times = in_iteration(
        done + 1, [&] { return schedule::run_iteration(schedule, iteration, done, steady_clock(), {}); });
    report(iteration, times, done + 1);
    numbers["kl_coefficient"] = kl_.coefficient();
    checkpoint.after_step(done + 1, setting_.options.iterations, numbers);
  }
  checkpoint.remove();
}

void PpoTrainer::report(const PpoIteration& iteration, const schedule::IterationTimes& times,
                        std::int64_t number) {
  using schedule::Task;
  double tokens = 0;
  for (const PpoResponse& response : iteration.responses())
    tokens += static_cast<double>(response.sample.tokens.size());
  Metrics metrics = iteration.metrics();
  metrics.emplace_back("time/generate_s", times.seconds(Task::kGenerate));
  metrics.emplace_back("time/score_s", times.seconds(Task::kScore) + times.seconds(Task::kAdvantage));
  metrics.emplace_back("time/train_s", times.seconds(Task::kTrain) + times.seconds(Task::kOptimize));
  metrics.emplace_back("time/iteration_s", times.wall_s);
  metrics.emplace_back("tokens_per_s", tokens / times.wall_s);
  metrics.emplace_back("samples_per_s", static_cast<double>(iteration.responses().size()) / times.wall_s);
  log_samples(iteration, number);
  setting_.context.observer->step("ppo", number, setting_.options.iterations, metrics);
}

void PpoTrainer::log_samples(const PpoIteration& iteration, std::int64_t number) {
  const auto count =
      std::min(static_cast<std::size_t>(setting_.options.samples_to_log), iteration.responses().size());
  for (std::size_t i = 0; i < count; ++i) {
    const PpoResponse& response = iteration.responses()[i];
    nlohmann::json line = {
        {"iteration", number},           {"prompt_id", response.prompt->id},
        {"task", response.prompt->task}, {"prompt", response.prompt->text},
        {"response", response.text},     {"finish_reason", to_string(response.sample.finish_reason)},
        {"score", response.scored.score}};
    for (std::size_t t = 0; t < response.rule_score.terms.size(); ++t)
      line["terms"][setting_.data.rules.names()[t]] = response.rule_score.terms[t];
    if (setting_.options.reward_model_weight != 0) line["reward_model"] = response.model_score;
    setting_.context.observer->sample("ppo",
                                      line.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace));
  }
}

}  // namespace rlhf

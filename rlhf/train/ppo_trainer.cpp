#include "rlhf/train/ppo_trainer.h"

#include <algorithm>
#include <utility>

#include "rlhf/core/error.h"
#include "rlhf/core/hash.h"
#include "rlhf/kernels/machine_rates.h"

namespace rlhf {

PpoTrainer::PpoTrainer(LanguageModel& policy, const FrozenModels& frozen, const PpoSetting& setting)
    : setting_(setting),
      policy_(setting.schedule.make_policy()),
      models_(policy, frozen, setting.data, setting.rollout, setting.options, setting.context,
              setting.schedule),
      state_(setting) {}

void PpoTrainer::run() {
  std::vector<LearningModel> learning = {{"policy", &models_.policy.parameters(), &models_.policy_optimizer}};
  if (models_.critic) learning.push_back({"value", &*models_.critic, &*models_.critic_optimizer});
  // Weights that generation still reads when an iteration ends; in-flight updates read the newest.
  const bool lags = models_.snapshot && !policy_->updates_in_flight();
  if (lags) learning.push_back({"snapshot", &*models_.snapshot, nullptr});
  StageCheckpoint checkpoint(setting_.context, "ppo", learning);
  std::map<std::string, double> numbers;
  state_.save(numbers);

  schedule::ExecutorOptions options;
  options.first = checkpoint.restore(numbers);
  const std::int64_t replay_step = setting_.context.replay_step;
  options.last = replay_step > 0 ? replay_step : setting_.options.iterations;
  options.published = lags ? std::max<std::int64_t>(0, options.first - 1) : options.first;
  options.sink = [&](const schedule::TraceEvent& event) { setting_.context.observer->lane_event(event); };
  state_.restore(numbers);
  alarm_.restore(numbers);
  if (models_.snapshot && !lags) models_.snapshot->copy_learned(models_.policy.parameters());
  models_.pack(setting_.context.compute);

  peak_flops_per_s_ = product_flops_per_s(setting_.context.compute);
  PpoWorkload workload(
      setting_, models_, state_, options.first, options.published,
      [&](std::int64_t iteration, const PpoWorkload::Batch& batch, const schedule::IterationTimes& times) {
        report(batch, times, iteration + 1);
        state_.save(numbers);
        alarm_.save(numbers);
        checkpoint.after_step(iteration + 1, options.last, numbers);
      });
  say_correction();
  setting_.context.observer->stage_begin("ppo", options.last);
  schedule::run(*policy_, workload, options);
  checkpoint.remove();
}

// What was chosen for the user, where nothing was said.
void PpoTrainer::say_correction() const {
  if (!setting_.options.corrects_rounding(setting_.rollout)) return;
  setting_.context.observer->message(
      LogLevel::kInfo, concat("ppo: ", setting_.rollout.rounding_text(),
                              ": old log-probs are the trainer's, and tokens are weighted by the ratio to "
                              "the sampler's, at most ",
                              setting_.options.algorithm.correction.upper,
                              " (ppo.weight_mismatch: truncate; ppo.algorithm.correction.upper)"));
}

void PpoTrainer::report(const PpoWorkload::Batch& batch, const schedule::IterationTimes& times,
                        std::int64_t number) {
  using schedule::Lane;
  using schedule::Task;
  const std::vector<PpoResponse>& responses = batch.rollout.responses();
  double tokens = 0;
  for (const PpoResponse& response : responses) tokens += static_cast<double>(response.sample.tokens.size());
  Metrics metrics = batch.training.metrics();
  if (setting_.options.algorithm.dynamic_sampling.enabled)
    metrics.emplace_back("rollout/resampled_groups",
                         static_cast<double>(batch.rollout.num_resampled_groups()));
  double work[] = {batch.rollout.decode_tokens_per_s(), take_flops(batch.rollout)};
  setting_.context.collective->all_reduce(std::span(work));
  const auto [rate, flops] = work;
  if (rate > 0) metrics.emplace_back("rollout/decode_tokens_per_s", rate);
  metrics.emplace_back("rollout/decode_steps", static_cast<double>(batch.rollout.num_engine_steps()));
  const auto add_time = [&](const std::string& name, double seconds) {
    metrics.emplace_back("time/" + name + "_s", seconds);
    metrics.emplace_back("time/" + name + "_share", seconds / times.wall_s);
  };
  const double generate = times.seconds(Task::kGenerate);
  const double score = times.seconds(Task::kScore) + times.seconds(Task::kAdvantage);
  const double train = times.seconds(Task::kTrain) + times.seconds(Task::kOptimize);
  add_time("generate", generate);
  add_time("score", score);
  add_time("train", train);
  metrics.emplace_back("time/iteration_s", times.wall_s);
  metrics.emplace_back("rollout/copied_weight_bytes", static_cast<double>(models_.take_copied_bytes()));
  if (models_.rollout_weights) metrics.emplace_back("time/pack_s", models_.take_pack_seconds());
  if (policy_->overlaps()) {
    metrics.emplace_back("time/overlap", (generate + score + train) / times.wall_s);
    add_time("generate_wait", times.waited(Lane::kGenerate));
    add_time("train_wait", times.waited(Lane::kTrain));
  }
  metrics.emplace_back("compute/gflop", flops / 1e9);
  metrics.emplace_back("compute/gflop_per_s", flops / times.wall_s / 1e9);
  metrics.emplace_back("compute/mfu",
                       flops / times.wall_s / peak_flops_per_s_ / setting_.context.collective->world_size());
  metrics.emplace_back("tokens_per_s", tokens / times.wall_s);
  metrics.emplace_back("samples_per_s", static_cast<double>(responses.size()) / times.wall_s);
  for (const auto& metric : models_.memory->take_metrics()) metrics.push_back(metric);
  if (const Accelerator* device = setting_.context.compute.accelerator())
    metrics.emplace_back("memory/device_peak_bytes", static_cast<double>(device->memory->peak_bytes()));
  log_samples(responses, number);
  setting_.context.observer->step("ppo", number, setting_.options.iterations, metrics);
  watch_proxy(metrics, number);
  // All ranks, because each may have a part of the newest weights only.
  if (first_rank_says(*setting_.context.collective, setting_.context.observer->wants_records()))
    setting_.context.observer->record("ppo", number, hashes_after(responses));
}

// Floating-point operations since the last report.
double PpoTrainer::take_flops(const PpoRollout& rollout) {
  const double passed = models_.pass.matmul_flops() + (models_.teacher ? models_.teacher->matmul_flops() : 0);
  return rollout.matmul_flops() + passed - std::exchange(passed_flops_, passed);
}

// The reward model is the proxy of what the rules measure.
void PpoTrainer::watch_proxy(const Metrics& metrics, std::int64_t number) {
  if (!models_.reward || setting_.data.rules.empty()) return;
  const auto warning =
      alarm_.observe(number, metric(metrics, "reward/model", 0), metric(metrics, "reward/rules", 0));
  if (!warning) return;
  warnings_.push_back("ppo: " + *warning);
  setting_.context.observer->message(LogLevel::kWarning, warnings_.back());
}

// Of what was sampled and of what was learned from it.
Hashes PpoTrainer::hashes_after(const std::vector<PpoResponse>& responses) const {
  std::uint64_t samples = 0;
  const auto add = [&]<class T>(const std::vector<T>& values) {
    samples = hash_values(std::span<const T>(values), samples);
  };
  for (const PpoResponse& response : responses) {
    add(response.prompt->tokens);
    add(response.sample.tokens);
    add(response.sample.logprobs);
    add(response.sample.mask);
    add(response.sample.weight_versions);
    add(std::vector<double>{response.scored.score});
  }
  Hashes hashes = {{"samples", hash_text(samples)},
                   {"policy", hash_text(models_.policy.parameters().learned_hash())}};
  if (models_.critic) hashes.emplace_back("critic", hash_text(models_.critic->learned_hash()));
  return hashes;
}

void PpoTrainer::log_samples(const std::vector<PpoResponse>& responses, std::int64_t number) {
  const auto count = std::min(static_cast<std::size_t>(setting_.options.samples_to_log), responses.size());
  for (std::size_t i = 0; i < count; ++i)
    setting_.context.observer->sample(
        "ppo", to_json_line(responses[i], number, responses[i].scored.score, models_.judges));
}

}  // namespace rlhf

#include "rlhf/train/ppo_workload.h"

#include <algorithm>

#include "rlhf/core/error.h"
#include "rlhf/schedule/batching_rules.h"

namespace rlhf {
namespace {

// What fn returns; an error of it is thrown on with the number of the iteration before its message.
template <class Fn>
auto in_iteration(std::int64_t iteration, const Fn& fn) {
  try {
    return fn();
  } catch (const InternalError&) {
    throw;
  } catch (const Error& error) {
    fail<Error>("ppo: iteration ", iteration + 1, ": ", error.what());
  }
}

}  // namespace

PpoWorkload::PpoWorkload(const PpoSetting& setting, PpoModels& models, PpoState& state, std::int64_t first,
                         WeightVersion version, Finish finish)
    : setting_(setting),
      models_(models),
      state_(state),
      finish_(std::move(finish)),
      next_to_start_(first),
      share_(setting.context.compute.pool().num_threads()),
      version_(version) {}

std::size_t PpoWorkload::num_samples() const {
  const ppo::PpoOptions& algorithm = setting_.options.algorithm;
  return algorithm.prompts_per_step * algorithm.samples_per_prompt;
}

std::size_t PpoWorkload::num_optimizer_steps() const {
  return rlhf::num_optimizer_steps(setting_.options.algorithm);
}

bool PpoWorkload::needs_whole_batch() const {
  return rlhf::needs_whole_batch(setting_) || setting_.context.collective->world_size() > 1;
}

PpoWorkload::Batch& PpoWorkload::batch(std::int64_t iteration) const {
  const std::lock_guard lock(batches_mutex_);
  return *batches_.at(iteration);
}

// ---- generate lane ----

void PpoWorkload::start_up_to(std::int64_t last_iteration) {
  for (; next_to_start_ <= last_iteration; ++next_to_start_) {
    auto batch = std::make_unique<Batch>(setting_, models_, state_, next_to_start_);
    batch->rollout.start();
    const std::lock_guard lock(batches_mutex_);
    batches_.emplace(next_to_start_, std::move(batch));
  }
}

std::vector<schedule::FinishedSample> PpoWorkload::generate(std::int64_t last_iteration) {
  if (setting_.context.collective->world_size() > 1) return generate_with_ranks(last_iteration);
  std::vector<schedule::FinishedSample> finished;
  for (int step = 0; step < schedule::kMostDecodeSteps && finished.empty(); ++step) {
    const auto turn = models_.memory->step();
    step_engine(last_iteration);
    while (auto sample = models_.engine->try_take()) {
      const auto iteration = static_cast<std::int64_t>(sample->tag);
      const auto group =
          in_iteration(iteration, [&] { return batch(iteration).rollout.accept(std::move(*sample)); });
      for (const std::size_t index : group) finished.push_back({iteration, index});
    }
  }
  return finished;
}

void PpoWorkload::step_engine(std::int64_t last_iteration) {
  start_up_to(last_iteration);
  RLHF_CHECK(models_.engine->busy(), "ppo: iteration ", last_iteration,
             " is incomplete and nothing is being generated");
  models_.memory->grow_cache();
  in_iteration(last_iteration, [&] { models_.engine->step(models_.generation_weights(), version_); });
}

// A whole batch at once: this rank's prompts, then the samples of the others.
std::vector<schedule::FinishedSample> PpoWorkload::generate_with_ranks(std::int64_t iteration) {
  start_up_to(iteration);
  PpoRollout& rollout = batch(iteration).rollout;
  while (!rollout.is_complete()) {
    const auto turn = models_.memory->step();
    step_engine(iteration);
    while (auto sample = models_.engine->try_take())
      in_iteration(iteration, [&] { return rollout.accept(std::move(*sample)); });
  }
  in_iteration(iteration, [&] { rollout.exchange(); });
  std::vector<schedule::FinishedSample> finished;
  for (std::size_t i = 0; i < rollout.responses().size(); ++i) finished.push_back({iteration, i});
  return finished;
}

// ---- train lane ----

void PpoWorkload::score(std::int64_t iteration, std::span<const schedule::SampleIndex> samples) {
  in_iteration(iteration, [&] { batch(iteration).training.score(samples); });
}

void PpoWorkload::compute_advantages(std::int64_t iteration, std::span<const schedule::SampleIndex> samples) {
  in_iteration(iteration, [&] { batch(iteration).training.compute_advantages(samples); });
}

std::size_t PpoWorkload::num_micro_batches(std::int64_t iteration, std::size_t step) const {
  return batch(iteration).training.num_micro_batches(step);
}

void PpoWorkload::train(std::int64_t iteration, std::size_t step, std::size_t micro_batch) {
  in_iteration(iteration, [&] { batch(iteration).training.train(step, micro_batch); });
}

void PpoWorkload::optimize(std::int64_t iteration, std::size_t step) {
  in_iteration(iteration, [&] { batch(iteration).training.optimize(step); });
}

void PpoWorkload::finish(std::int64_t iteration, const schedule::IterationTimes& times) {
  // Lanes that took turns had all threads each.
  if (trial_.overlaps())
    share_.observe(times.wall_s - times.waited(schedule::Lane::kGenerate),
                   times.wall_s - times.waited(schedule::Lane::kTrain));
  finish_(iteration, batch(iteration), times);
  double tokens = 0;
  for (const PpoResponse& response : batch(iteration).rollout.responses())
    tokens += static_cast<double>(response.tokens.size());
  if (setting_.schedule.mode == ScheduleMode::kStreamed) trial_.observe(times.wall_s / tokens);
  const std::lock_guard lock(batches_mutex_);
  batches_.erase(iteration);
}

void PpoWorkload::publish(std::int64_t iteration) {
  models_.memory->between_steps([&] {
    models_.publish(setting_.context.compute);
    version_ = iteration + 1;
  });
}

// Two busy lanes split the cores by what they took so far; a lane on its own has them all.
void PpoWorkload::lanes_changed(bool generate_busy, bool train_busy) {
  models_.memory->set_training(train_busy);
  if (!models_.generate_pool) return;
  ThreadPool& train_pool = setting_.context.compute.pool();
  const int all = train_pool.num_threads();
  const bool both = generate_busy && train_busy;
  models_.generate_pool->set_active_threads(both ? share_.generate() : all);
  train_pool.set_active_threads(both ? share_.train() : all);
}

}  // namespace rlhf

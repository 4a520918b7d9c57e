#include "rlhf/schedule/simulated_workload.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>

#include "rlhf/core/error.h"
#include "rlhf/core/random.h"
#include "rlhf/schedule/batching_rules.h"

namespace rlhf::schedule {
namespace {

// Keep the draws of lengths and of failures apart.
constexpr std::uint64_t kLengthSeed = 0x1e46e15, kFailureSeed = 0xfa11ed;

double to_double(std::size_t n) {
  return static_cast<double>(n);
}

}  // namespace

std::int64_t response_tokens(const SimulatedRun& run, const LengthModel& lengths, std::int64_t iteration,
                             std::size_t prompt, std::size_t sample) {
  const auto draw = [&](std::size_t k) {
    return uniform_at(run.seed ^ kLengthSeed, static_cast<std::uint64_t>(iteration),
                      static_cast<std::uint32_t>(prompt), static_cast<std::uint32_t>(2 * sample + k));
  };
  // Box-Muller; 1 - u is never 0.
  const double z = std::sqrt(-2 * std::log(1 - draw(0))) * std::cos(2 * std::numbers::pi * draw(1));
  const double mu = std::log(lengths.mean_tokens) - lengths.sigma * lengths.sigma / 2;
  const double tokens = std::round(std::exp(mu + lengths.sigma * z));
  return static_cast<std::int64_t>(std::clamp(tokens, 1.0, static_cast<double>(run.max_new_tokens)));
}

SimulatedWorkload::SimulatedWorkload(const SimulatedRun& run, const CostModel& costs, std::size_t rank,
                                     std::size_t num_ranks)
    : run_(run),
      costs_(costs),
      rank_(rank),
      first_prompt_(rank * run.prompts / num_ranks),
      num_prompts_((rank + 1) * run.prompts / num_ranks - first_prompt_),
      // Of the smallest share: all ranks take the same number of optimizer steps.
      parts_(std::min(run.mini_batches, run.prompts / num_ranks * run.samples_per_prompt)),
      mini_batch_unit_(mini_batch_unit(run.prompts / num_ranks, run.samples_per_prompt, parts_)),
      prompt_tokens_(std::llround(costs.lengths.prompt_tokens)),
      engine_(run.engine, costs.decode) {}

void SimulatedWorkload::set_cost(Lane lane, double compute_s, double reward_s) {
  costs_of_last_[static_cast<std::size_t>(lane)] = {compute_s, reward_s};
}

// ---- generate lane ----

void SimulatedWorkload::start(std::int64_t iteration) {
  Batch& batch = batches_[iteration];
  batch.unfinished.assign(num_prompts_, run_.samples_per_prompt);
  batch.steps.resize(num_optimizer_steps());
  for (std::size_t p = 0; p < num_prompts_; ++p) {
    SimulatedEngine::Request request{iteration, p * run_.samples_per_prompt, prompt_tokens_, {}};
    for (std::size_t k = 0; k < run_.samples_per_prompt; ++k)
      request.lengths.push_back(response_tokens(run_, costs_.lengths, iteration, first_prompt_ + p, k));
    batch.lengths.insert(batch.lengths.end(), request.lengths.begin(), request.lengths.end());
    engine_.submit(std::move(request));
  }
}

std::vector<FinishedSample> SimulatedWorkload::generate(std::int64_t last_iteration) {
  for (; next_to_start_ <= last_iteration; ++next_to_start_) start(next_to_start_);
  std::vector<FinishedSample> groups;
  for (std::int64_t steps = 0; steps < kMostDecodeSteps && groups.empty();) {
    steps += engine_.run(kMostDecodeSteps - steps);
    for (const FinishedSample& sample : engine_.take_finished()) {
      const std::size_t prompt = group_of(sample.sample);
      if (--batch(sample.iteration).unfinished[prompt] > 0) continue;
      for (std::size_t k = 0; k < run_.samples_per_prompt; ++k)
        groups.push_back({sample.iteration, prompt * run_.samples_per_prompt + k});
    }
  }
  set_cost(Lane::kGenerate, engine_.take_seconds());
  return groups;
}

// ---- train lane ----

// Rows of a pass that a sample adds after one of `group`.
std::size_t SimulatedWorkload::pass_tokens(const Batch& batch, SampleIndex sample, std::size_t group) const {
  const auto prompt = group_of(sample) == group ? 0 : static_cast<std::size_t>(prompt_tokens_);
  return prompt + static_cast<std::size_t>(batch.lengths[sample]);
}

double SimulatedWorkload::reward_wait_s() {
  const ScoreCosts& score = costs_.score;
  double seconds = score.latency_s;
  if (score.failure_probability > 0)
    while (uniform_at(run_.seed ^ kFailureSeed, rank_, num_reward_calls_++, 0) < score.failure_probability)
      seconds += score.timeout_s;
  return seconds;
}

void SimulatedWorkload::score(std::int64_t iteration, std::span<const SampleIndex> samples) {
  std::size_t tokens = 0, group = SIZE_MAX;
  for (const SampleIndex i : samples) {
    tokens += pass_tokens(batch(iteration), i, group);
    group = group_of(i);
  }
  set_cost(Lane::kTrain, costs_.score.call_s + to_double(tokens) * costs_.score.token_s, reward_wait_s());
}

// All micro-batches but the last `kept`; takes their samples out of the list. All but the last are full.
std::vector<SimulatedWorkload::MicroBatch> SimulatedWorkload::cut(const Batch& batch,
                                                                  std::vector<SampleIndex>& samples,
                                                                  std::size_t kept) const {
  std::vector<MicroBatch> passes;
  std::size_t group = SIZE_MAX;
  for (const SampleIndex i : samples) {
    std::size_t tokens = pass_tokens(batch, i, group);
    if (passes.empty() || passes.back().num_tokens + tokens > run_.max_tokens_per_micro_batch) {
      passes.emplace_back();
      tokens = pass_tokens(batch, i, SIZE_MAX);
    }
    ++passes.back().num_samples;
    passes.back().num_tokens += tokens;
    group = group_of(i);
  }
  passes.resize(passes.size() - std::min(passes.size(), kept));
  std::size_t taken = 0;
  for (const MicroBatch& pass : passes) taken += pass.num_samples;
  samples.erase(samples.begin(), samples.begin() + static_cast<std::ptrdiff_t>(taken));
  return passes;
}

// Micro-batches of the first optimizer step, cut while samples still arrive, as MicroBatchPool does.
void SimulatedWorkload::add_pending(Batch& batch, std::span<const SampleIndex> samples) {
  for (const SampleIndex i : samples) {
    if (!belongs(i, 0)) continue;
    batch.pending.push_back(i);
    ++batch.num_seen;
    batch.num_seen_tokens += pass_tokens(batch, i, SIZE_MAX);
  }
  if (batch.pending.empty()) return;
  const std::size_t units = num_samples() / mini_batch_unit_;
  const std::size_t num_members = (units + parts_ - 1) / parts_ * mini_batch_unit_;
  const std::size_t kept = num_kept_micro_batches(num_members - batch.num_seen, batch.num_seen,
                                                  batch.num_seen_tokens, run_.max_tokens_per_micro_batch);
  for (const MicroBatch& pass : cut(batch, batch.pending, kept)) batch.steps[0].push_back(pass);
}

void SimulatedWorkload::compute_advantages(std::int64_t iteration, std::span<const SampleIndex> samples) {
  set_cost(Lane::kTrain, costs_.train.advantage_s);
  Batch& now = batch(iteration);
  const std::size_t n = run_.samples_per_prompt;
  if (!run_.needs_whole_batch)
    for (std::size_t begin = 0; begin < samples.size(); begin += n)
      add_pending(now, samples.subspan(begin, n));
  now.num_advantaged += samples.size();
  if (now.num_advantaged < num_samples()) return;
  for (std::size_t step = run_.needs_whole_batch ? 0 : 1; step < now.steps.size(); ++step) {
    std::vector<SampleIndex> members;
    for (SampleIndex i = 0; i < num_samples(); ++i)
      if (belongs(i, step)) members.push_back(i);
    now.steps[step] = cut(now, members, 0);
  }
}

std::size_t SimulatedWorkload::num_micro_batches(std::int64_t iteration, std::size_t step) const {
  return batches_.at(iteration).steps[step].size();
}

void SimulatedWorkload::train(std::int64_t iteration, std::size_t step, std::size_t micro_batch) {
  const MicroBatch& pass = batch(iteration).steps[step][micro_batch];
  set_cost(Lane::kTrain, costs_.train.micro_batch_s + to_double(pass.num_tokens) * costs_.train.token_s);
}

void SimulatedWorkload::optimize(std::int64_t, std::size_t) {
  set_cost(Lane::kTrain, costs_.train.optimize_s);
}

void SimulatedWorkload::finish(std::int64_t iteration, const IterationTimes&) {
  set_cost(Lane::kTrain, costs_.train.finish_s);
  const Batch& now = batch(iteration);
  trained_tokens_ += std::accumulate(now.lengths.begin(), now.lengths.end(), std::int64_t{0});
  for (std::size_t step = 0; step < parts_; ++step)
    for (const MicroBatch& pass : now.steps[step]) trained_samples_ += pass.num_samples;
  batches_.erase(iteration);
}

void SimulatedWorkload::publish(std::int64_t iteration) {
  set_cost(Lane::kTrain, costs_.train.publish_s);
  engine_.set_version(iteration + 1);
}

}  // namespace rlhf::schedule

#include "rlhf/schedule/progress.h"

#include <algorithm>

#include "rlhf/core/error.h"

namespace rlhf::schedule {
namespace {

template <class... Args>
void require(bool holds, const Args&... what) {
  if (!holds) fail<InternalError>("schedule: ", what...);
}

// The given samples must be the next ones, in the order of arrival.
void require_next(const std::vector<SampleIndex>& arrived, std::size_t done,
                  const std::vector<SampleIndex>& samples, std::size_t limit, const char* what) {
  require(!samples.empty(), what, " of no sample");
  require(done + samples.size() <= limit, what, " of ", samples.size(), " samples, ", limit - done,
          " are ready");
  for (std::size_t i = 0; i < samples.size(); ++i)
    require(samples[i] == arrived[done + i], what, " of sample ", samples[i], " before sample ",
            arrived[done + i]);
}

}  // namespace

const char* to_string(Task task) {
  switch (task) {
    case Task::kGenerate:
      return "generate";
    case Task::kScore:
      return "score";
    case Task::kAdvantage:
      return "advantage";
    case Task::kTrain:
      return "train";
    case Task::kOptimize:
      return "optimize";
    case Task::kFinish:
      return "finish";
    case Task::kPublish:
      return "publish";
  }
  return "unknown";
}

const char* to_string(Lane lane) {
  return lane == Lane::kGenerate ? "generate" : "train";
}

Progress::Progress(const Workload& workload, std::int64_t first, std::int64_t last, std::int64_t published)
    : workload_(&workload),
      last_(last),
      generated_(first),
      trained_(first),
      published_(published),
      num_samples_(workload.num_samples()),
      num_steps_(workload.num_optimizer_steps()),
      whole_batch_(workload.needs_whole_batch()) {
  require(first >= 0 && first <= last && published >= 0 && published <= first, "a run from ", first, " to ",
          last, " with weights ", published);
  require(num_samples_ > 0 && num_steps_ > 0, "an iteration of ", num_samples_, " samples and ", num_steps_,
          " optimizer steps");
}

const Progress::Iteration& Progress::current() const {
  static const Iteration kNone;
  const auto found = iterations_.find(trained_);
  return found == iterations_.end() ? kNone : found->second;
}

std::map<std::int64_t, std::set<SampleIndex>> Progress::arrived() const {
  std::map<std::int64_t, std::set<SampleIndex>> all;
  for (const auto& [k, iteration] : iterations_)
    all[k] = {iteration.arrived.begin(), iteration.arrived.end()};
  return all;
}

void Progress::check(const Action& action) const {
  const std::int64_t k = action.iteration;
  const Iteration& now = current();
  const char* name = to_string(action.task);
  if (action.task == Task::kGenerate)
    return require(generated_ < last_ && k >= generated_ && k < last_, "generate up to iteration ", k, ", ",
                   generated_, " of ", last_, " are complete");
  if (action.task == Task::kPublish)
    return require(published_ < trained_ && k == published_, "publish of iteration ", k, ", expected ",
                   published_, " after ", trained_, " are trained");
  require(trained_ < last_ && k == trained_, name, " of iteration ", k, ", expected ", trained_);
  switch (action.task) {
    case Task::kScore:
      return require_next(now.arrived, now.num_scored, action.samples, now.arrived.size(), name);
    case Task::kAdvantage:
      require(!whole_batch_ || action.samples.size() == num_samples_, "advantages of ", action.samples.size(),
              " of ", num_samples_, " samples, and they need the whole batch");
      return require_next(now.arrived, now.num_advantaged, action.samples, now.num_scored, name);
    case Task::kTrain:
      return require(
          action.step == now.step && action.micro_batch == now.num_trained && now.num_trained < now.num_ready,
          "training step ", action.step, " micro-batch ", action.micro_batch, ", expected step ", now.step,
          " micro-batch ", now.num_trained, " of ", now.num_ready);
    case Task::kOptimize:
      require(action.step == now.step && now.step < num_steps_, "optimizer step ", action.step, ", expected ",
              now.step, " of ", num_steps_);
      require(now.num_advantaged == num_samples_, "optimizer step ", action.step, " with ",
              now.num_advantaged, " of ", num_samples_, " samples ready");
      // Training changes the weights that older, unpublished ones would be copied from.
      require(published_ == k, "optimizer step of iteration ", k, " before ", published_, " is published");
      return require(now.num_trained == now.num_ready, "optimizer step ", action.step, " with ",
                     now.num_trained, " of ", now.num_ready, " micro-batches trained");
    case Task::kFinish:
      return require(now.step == num_steps_, "iteration ", k, " finished after ", now.step, " of ",
                     num_steps_, " optimizer steps");
    default:
      return;
  }
}

void Progress::record(const Action& action, std::size_t num_ready) {
  if (action.task == Task::kPublish) {
    ++published_;
    return;
  }
  if (action.task == Task::kFinish) {
    iterations_.erase(trained_);
    ++trained_;
    return;
  }
  Iteration& now = iterations_[trained_];
  switch (action.task) {
    case Task::kScore:
      now.num_scored += action.samples.size();
      break;
    case Task::kAdvantage:
      now.num_advantaged += action.samples.size();
      now.num_ready = num_ready;
      break;
    case Task::kTrain:
      ++now.num_trained;
      break;
    case Task::kOptimize:
      ++now.step;
      now.num_ready = num_ready;
      now.num_trained = 0;
      break;
    default:
      break;
  }
}

void Progress::record_samples(const Action& generate, const std::vector<FinishedSample>& finished) {
  for (const FinishedSample& sample : finished) {
    const std::int64_t k = sample.iteration;
    require(k >= generated_ && k <= generate.iteration, "generation returned a sample of iteration ", k,
            ", allowed were ", generated_, " to ", generate.iteration);
    require(sample.sample < num_samples_, "generation returned sample ", sample.sample, " of ", num_samples_);
    std::vector<SampleIndex>& arrived = iterations_[k].arrived;
    require(std::ranges::find(arrived, sample.sample) == arrived.end(), "generation returned sample ",
            sample.sample, " of iteration ", k, " twice");
    arrived.push_back(sample.sample);
  }
  while (generated_ < last_ && iterations_.contains(generated_) && is_complete(iterations_.at(generated_)))
    ++generated_;
}

}  // namespace rlhf::schedule

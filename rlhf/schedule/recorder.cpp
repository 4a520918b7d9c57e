#include "rlhf/schedule/recorder.h"

#include <utility>

#include "rlhf/core/error.h"

namespace rlhf::schedule {
namespace {

template <class... Args>
void require(bool holds, const Args&... what) {
  if (!holds) fail<InternalError>("schedule: ", what...);
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
    case Task::kPublish:
      return "publish";
  }
  return "unknown";
}

Recorder::Recorder(IterationTasks& tasks, std::int64_t iteration, Clock clock, TraceSink sink)
    : tasks_(tasks),
      iteration_(iteration),
      clock_(std::move(clock)),
      sink_(std::move(sink)),
      begin_s_(clock_()),
      finished_(tasks.num_samples(), 0),
      scored_(tasks.num_samples(), 0),
      num_steps_(tasks.num_optimizer_steps()) {}

void Recorder::record(Task task, double begin_s, std::size_t num_samples) {
  const double end_s = clock_();
  times_.task_s[static_cast<std::size_t>(task)] += end_s - begin_s;
  if (sink_) sink_({task, iteration_, begin_s, end_s, num_samples});
}

template <class Call>
void Recorder::timed(Task task, std::size_t num_samples, Call call) {
  const double begin_s = clock_();
  call();
  record(task, begin_s, num_samples);
}

std::vector<SampleIndex> Recorder::generate() {
  require(num_finished_ < finished_.size(), "generate after all ", finished_.size(),
          " samples have finished");
  const double begin_s = clock_();
  std::vector<SampleIndex> samples = tasks_.generate();
  record(Task::kGenerate, begin_s, samples.size());
  require(!samples.empty(), "generation returned no sample, ", num_finished_, " of ", finished_.size(),
          " have finished");
  for (const SampleIndex sample : samples) {
    require(sample < finished_.size(), "generation returned sample ", sample, " of ", finished_.size());
    require(!finished_[sample], "generation returned sample ", sample, " twice");
    finished_[sample] = 1;
    ++num_finished_;
  }
  return samples;
}

void Recorder::score(std::span<const SampleIndex> samples) {
  for (const SampleIndex sample : samples) {
    require(sample < scored_.size() && finished_[sample], "sample ", sample,
            " is scored before it has finished");
    require(!scored_[sample], "sample ", sample, " is scored twice");
    scored_[sample] = 1;
    ++num_scored_;
  }
  timed(Task::kScore, samples.size(), [&] { tasks_.score(samples); });
}

void Recorder::compute_advantages() {
  require(num_scored_ == scored_.size(), "advantages with ", num_scored_, " of ", scored_.size(),
          " samples scored");
  require(!has_advantages_, "advantages computed twice");
  timed(Task::kAdvantage, 0, [&] { tasks_.compute_advantages(); });
  has_advantages_ = true;
}

void Recorder::train(std::size_t step, std::size_t micro_batch) {
  require(has_advantages_, "training before the advantages");
  require(step == next_step_ && micro_batch == next_micro_batch_, "training step ", step, " micro-batch ",
          micro_batch, ", expected step ", next_step_, " micro-batch ", next_micro_batch_);
  require(micro_batch < tasks_.num_micro_batches(step), "step ", step, " has no micro-batch ", micro_batch);
  timed(Task::kTrain, 0, [&] { tasks_.train(step, micro_batch); });
  ++next_micro_batch_;
}

void Recorder::optimize(std::size_t step) {
  require(step == next_step_ && step < num_steps_, "optimizer step ", step, ", expected ", next_step_, " of ",
          num_steps_);
  require(has_advantages_ && next_micro_batch_ == tasks_.num_micro_batches(step), "optimizer step ", step,
          " with ", next_micro_batch_, " micro-batches trained");
  timed(Task::kOptimize, 0, [&] { tasks_.optimize(step); });
  ++next_step_;
  next_micro_batch_ = 0;
}

void Recorder::publish() {
  require(next_step_ == num_steps_ && !published_, "publish after ", next_step_, " of ", num_steps_,
          " optimizer steps");
  require(has_advantages_, "publish before the advantages");
  timed(Task::kPublish, 0, [&] { tasks_.publish(); });
  published_ = true;
}

IterationTimes Recorder::finish() {
  require(published_, "the iteration ended without publishing");
  times_.wall_s = clock_() - begin_s_;
  return times_;
}

}  // namespace rlhf::schedule

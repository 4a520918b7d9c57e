#include "rlhf/schedule/policy.h"

#include <algorithm>

#include "rlhf/core/error.h"

namespace rlhf::schedule {
namespace {

std::vector<SampleIndex> between(const std::vector<SampleIndex>& arrived, std::size_t begin,
                                 std::size_t end) {
  return {arrived.begin() + static_cast<std::ptrdiff_t>(begin),
          arrived.begin() + static_cast<std::ptrdiff_t>(end)};
}

// The next step of the iteration in training. Samples that have come are scored first: their micro-batches
// are larger then. `early`: begin before the batch is complete.
std::optional<Action> next_of_iteration(const Progress& progress, bool early) {
  const Progress::Iteration& now = progress.current();
  const std::int64_t k = progress.trained();
  if (k == progress.last()) return {};
  const bool complete = progress.is_complete(now);
  if (!early && !complete) return {};
  if (now.num_scored < now.arrived.size())
    return Action{Task::kScore, k, between(now.arrived, now.num_scored, now.arrived.size()), 0, 0};
  if (now.num_advantaged < now.num_scored && (complete || !progress.needs_whole_batch()))
    return Action{Task::kAdvantage, k, between(now.arrived, now.num_advantaged, now.num_scored), 0, 0};
  if (now.num_trained < now.num_ready) return Action{Task::kTrain, k, {}, now.step, now.num_trained};
  if (!complete) return {};
  if (now.step == progress.num_optimizer_steps()) return Action{Task::kFinish, k, {}, 0, 0};
  // Weights that generation still has to read are copied before they change.
  if (progress.published() < k) return {};
  return Action{Task::kOptimize, k, {}, now.step, 0};
}

// Decodes the prompts up to `limit`, if there is one that has not been answered.
std::optional<Action> generate_up_to(const Progress& progress, std::int64_t limit) {
  limit = std::min(limit, progress.last() - 1);
  if (progress.generated() > limit) return {};
  return Action{Task::kGenerate, limit, {}, 0, 0};
}

class Serial : public Policy {
 public:
  std::string_view name() const override { return "serial"; }
  bool overlaps() const override { return false; }
  std::int64_t max_staleness() const override { return 0; }
  bool updates_in_flight() const override { return false; }
  std::optional<Action> next(Lane lane, const Progress& progress) const override {
    if (lane == Lane::kGenerate) return generate_up_to(progress, progress.published());
    if (progress.published() < progress.trained())
      return Action{Task::kPublish, progress.published(), {}, 0, 0};
    return next_of_iteration(progress, false);
  }
};

class Streamed : public Serial {
 public:
  std::string_view name() const override { return "streamed"; }
  bool overlaps() const override { return true; }
  std::optional<Action> next(Lane lane, const Progress& progress) const override {
    if (lane == Lane::kGenerate || progress.published() < progress.trained())
      return Serial::next(lane, progress);
    return next_of_iteration(progress, progress.overlap_pays());
  }
};

class OneStepOff : public Policy {
 public:
  std::string_view name() const override { return "one_step_off"; }
  bool overlaps() const override { return true; }
  std::int64_t max_staleness() const override { return 1; }
  bool updates_in_flight() const override { return false; }
  std::optional<Action> next(Lane lane, const Progress& progress) const override {
    const std::int64_t published = progress.published();
    // One batch at a time, so that the weights can change between two of them.
    if (lane == Lane::kGenerate)
      return generate_up_to(progress, std::min(progress.generated(), published + 1));
    const std::int64_t read_by = std::min(published + 2, progress.last());
    if (published < progress.trained() && progress.generated() >= read_by)
      return Action{Task::kPublish, published, {}, 0, 0};
    return next_of_iteration(progress, true);
  }
};

class Async : public Policy {
 public:
  explicit Async(std::int64_t max_staleness) : max_staleness_(max_staleness) {
    RLHF_CHECK(max_staleness >= 1, "schedule: mode async with max_staleness ", max_staleness,
               ", expected at least 1; on-policy modes are serial and streamed");
  }
  std::string_view name() const override { return "async"; }
  bool overlaps() const override { return true; }
  std::int64_t max_staleness() const override { return max_staleness_; }
  bool updates_in_flight() const override { return true; }
  std::optional<Action> next(Lane lane, const Progress& progress) const override {
    if (lane == Lane::kGenerate) return generate_up_to(progress, progress.published() + max_staleness_);
    if (progress.published() < progress.trained())
      return Action{Task::kPublish, progress.published(), {}, 0, 0};
    return next_of_iteration(progress, true);
  }

 private:
  std::int64_t max_staleness_;
};

}  // namespace

std::unique_ptr<Policy> serial_policy() {
  return std::make_unique<Serial>();
}
std::unique_ptr<Policy> streamed_policy() {
  return std::make_unique<Streamed>();
}
std::unique_ptr<Policy> one_step_off_policy() {
  return std::make_unique<OneStepOff>();
}
std::unique_ptr<Policy> async_policy(std::int64_t max_staleness) {
  return std::make_unique<Async>(max_staleness);
}

}  // namespace rlhf::schedule

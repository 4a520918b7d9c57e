#include "rlhf/schedule/simulator.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>

#include "rlhf/core/error.h"

namespace rlhf::schedule {
namespace {

std::size_t index(Lane lane) {
  return static_cast<std::size_t>(lane);
}

// What a lane is busy with: waits, one after another, then work on the device.
struct Activity {
  struct Phase {
    Wait why = Wait::kReward;
    double seconds = 0;
  };
  Action action;
  std::array<Phase, 2> waits{};
  double compute_s = 0;  // alone on the device
  std::vector<FinishedSample> finished;

  Phase* waiting() {
    for (Phase& phase : waits)
      if (phase.seconds > 0) return &phase;
    return nullptr;
  }
  bool done() { return !waiting() && compute_s == 0; }
};

// One device. Simulated on its own from one optimizer step to the next: between them it has nothing to do
// with the others.
class Rank {
 public:
  Rank(const Policy& policy, const SimulatedRun& run, const CostModel& costs, std::size_t rank,
       std::size_t num_ranks)
      : policy_(policy),
        sharing_(costs.sharing),
        workload_(run, costs, rank, num_ranks),
        progress_(workload_, 0, run.iterations, 0) {}

  // Runs until its train lane has reached an optimizer step, or to the end. Returns false at the end.
  bool run() {
    while (!progress_.done()) {
      for (const Lane lane : kAllLanes) start(lane);
      if (at_barrier_) return true;
      advance();
    }
    return false;
  }

  // Lets the optimizer step begin that it has reached.
  void pass_barrier(double begin_s, double all_reduce_s) {
    Activity& step = *lanes_[index(Lane::kTrain)];
    step.waits = {Activity::Phase{Wait::kSlowestRank, begin_s - now_s_},
                  Activity::Phase{Wait::kAllReduce, all_reduce_s}};
    at_barrier_ = false;
  }

  double now_s() const { return now_s_; }
  const std::vector<double>& finish_s() const { return finish_s_; }
  void add_to(Simulation& total) const {
    total.wall_s = std::max(total.wall_s, now_s_);
    total.trained_samples += workload_.trained_samples();
    total.trained_tokens += workload_.trained_tokens();
    const auto& tokens = workload_.tokens_by_staleness();
    if (tokens.size() > total.tokens_by_staleness.size()) total.tokens_by_staleness.resize(tokens.size());
    for (std::size_t i = 0; i < tokens.size(); ++i) total.tokens_by_staleness[i] += tokens[i];
    for (std::size_t i = 0; i < busy_s_.size(); ++i) total.busy_s[i] += busy_s_[i];
    for (std::size_t i = 0; i < task_s_.size(); ++i) total.task_s[i] += task_s_[i];
    for (std::size_t i = 0; i < wait_s_.size(); ++i) total.wait_s[i] += wait_s_[i];
    total.idle_s += idle_s_;
  }

 private:
  void start(Lane lane) {
    auto& slot = lanes_[index(lane)];
    const auto& other = lanes_[1 - index(lane)];
    if (slot || (other && !policy_.overlaps())) return;
    auto action = policy_.next(lane, progress_);
    if (!action) return;
    if (lane_of(action->task) != lane)
      fail<InternalError>("simulation: ", to_string(action->task), " on the lane ", to_string(lane));
    progress_.check(*action);
    slot.emplace();
    slot->action = std::move(*action);
    call(*slot);
    const SimulatedWorkload::Cost cost = workload_.cost(lane);
    slot->compute_s = cost.compute_s;
    slot->waits[0] = {Wait::kReward, cost.reward_s};
    at_barrier_ |= slot->action.task == Task::kOptimize;
  }

  void call(Activity& activity) {
    const Action& action = activity.action;
    const std::int64_t k = action.iteration;
    switch (action.task) {
      case Task::kGenerate:
        activity.finished = workload_.generate(k);
        return;
      case Task::kScore:
        return workload_.score(k, action.samples);
      case Task::kAdvantage:
        return workload_.compute_advantages(k, action.samples);
      case Task::kTrain:
        return workload_.train(k, action.step, action.micro_batch);
      case Task::kOptimize:
        return workload_.optimize(k, action.step);
      case Task::kFinish:
        finish_s_.push_back(now_s_);
        return workload_.finish(k, {});
      case Task::kPublish:
        return workload_.publish(k);
    }
  }

  // Goes to the next moment at which a wait or some work ends.
  void advance() {
    std::array<bool, 2> computes{};
    for (const Lane lane : kAllLanes) {
      auto& slot = lanes_[index(lane)];
      computes[index(lane)] = slot && !slot->waiting();
    }
    const bool shared = computes[0] && computes[1];
    const std::array<double, 2> speed = {shared ? sharing_.generate : 1, shared ? sharing_.train : 1};
    std::array<double, 2> left;
    left.fill(std::numeric_limits<double>::infinity());
    for (const Lane lane : kAllLanes)
      if (auto& slot = lanes_[index(lane)])
        left[index(lane)] = slot->waiting() ? slot->waiting()->seconds : slot->compute_s / speed[index(lane)];
    const double seconds = std::min(left[0], left[1]);
    if (std::isinf(seconds)) stop_stuck();
    account(computes, seconds);
    now_s_ += seconds;
    for (const Lane lane : kAllLanes) {
      auto& slot = lanes_[index(lane)];
      if (!slot) continue;
      double& remaining = computes[index(lane)] ? slot->compute_s : slot->waiting()->seconds;
      // What ends now ends exactly, whatever the rounding.
      const bool ends = left[index(lane)] == seconds;
      const double done = seconds * (computes[index(lane)] ? speed[index(lane)] : 1);
      remaining = ends ? 0 : std::max(0.0, remaining - done);
      if (slot->done()) complete(lane);
    }
  }

  void account(const std::array<bool, 2>& computes, double seconds) {
    for (const Lane lane : kAllLanes) {
      auto& slot = lanes_[index(lane)];
      if (computes[index(lane)]) {
        busy_s_[index(lane)] += seconds;
        task_s_[static_cast<std::size_t>(slot->action.task)] += seconds;
      } else if (slot)
        wait_s_[static_cast<std::size_t>(slot->waiting()->why)] += seconds;
      else if (lane == Lane::kTrain)
        wait_s_[static_cast<std::size_t>(Wait::kSamples)] += seconds;
      else if (progress_.generated() < progress_.last())
        wait_s_[static_cast<std::size_t>(Wait::kWeights)] += seconds;
    }
    if (!computes[0] && !computes[1]) idle_s_ += seconds;
  }

  void complete(Lane lane) {
    const Activity activity = std::move(*lanes_[index(lane)]);
    lanes_[index(lane)].reset();
    const Action& action = activity.action;
    if (action.task == Task::kGenerate) return progress_.record_samples(action, activity.finished);
    std::size_t num_ready = 0;
    if (action.task == Task::kAdvantage) num_ready = workload_.num_micro_batches(action.iteration, 0);
    if (action.task == Task::kOptimize && action.step + 1 < workload_.num_optimizer_steps())
      num_ready = workload_.num_micro_batches(action.iteration, action.step + 1);
    progress_.record(action, num_ready);
  }

  [[noreturn]] void stop_stuck() const {
    fail<InternalError>("simulation: policy ", policy_.name(),
                        " leaves both lanes waiting: ", progress_.generated(), " iterations generated, ",
                        progress_.trained(), " trained, ", progress_.published(), " published");
  }

  const Policy& policy_;
  const SharingModel& sharing_;
  SimulatedWorkload workload_;
  Progress progress_;
  std::array<std::optional<Activity>, 2> lanes_;
  bool at_barrier_ = false;
  double now_s_ = 0, idle_s_ = 0;
  std::array<double, kAllLanes.size()> busy_s_{};
  std::array<double, kAllTasks.size()> task_s_{};
  std::array<double, kAllWaits.size()> wait_s_{};
  std::vector<double> finish_s_;  // of each iteration
};

// Runs all ranks to the end, from one common optimizer step to the next.
void run_all(std::vector<std::unique_ptr<Rank>>& ranks, double all_reduce_s) {
  while (true) {
    std::size_t num_waiting = 0;
    double begin_s = 0;
    for (const auto& rank : ranks)
      if (rank->run()) {
        ++num_waiting;
        begin_s = std::max(begin_s, rank->now_s());
      }
    if (num_waiting == 0) return;
    if (num_waiting != ranks.size())
      fail<InternalError>("simulation: ", num_waiting, " of ", ranks.size(),
                          " devices reach an optimizer step");
    for (const auto& rank : ranks) rank->pass_barrier(begin_s, all_reduce_s);
  }
}

}  // namespace

const char* to_string(Wait wait) {
  switch (wait) {
    case Wait::kSamples:
      return "samples";
    case Wait::kWeights:
      return "weights";
    case Wait::kSlowestRank:
      return "slowest_rank";
    case Wait::kAllReduce:
      return "all_reduce";
    case Wait::kReward:
      return "reward";
  }
  return "unknown";
}

double Simulation::mean_staleness() const {
  double sum = 0, count = 0;
  for (std::size_t i = 0; i < tokens_by_staleness.size(); ++i) {
    sum += static_cast<double>(i) * static_cast<double>(tokens_by_staleness[i]);
    count += static_cast<double>(tokens_by_staleness[i]);
  }
  return count > 0 ? sum / count : 0;
}

Simulation simulate(const Policy& policy, const SimulatedRun& run, const CostModel& costs,
                    std::size_t devices) {
  RLHF_CHECK(devices > 0 && run.prompts >= devices, "simulation: ", run.prompts,
             " prompts a batch (ppo.algorithm.prompts_per_step) for ", devices,
             " devices, expected at least one prompt a device");
  std::vector<std::unique_ptr<Rank>> ranks;
  for (std::size_t i = 0; i < devices; ++i)
    ranks.push_back(std::make_unique<Rank>(policy, run, costs, i, devices));
  run_all(ranks, costs.network.all_reduce_s(static_cast<std::int64_t>(devices)));

  Simulation result;
  result.devices = devices;
  double before_s = 0;
  for (std::size_t k = 0; k < static_cast<std::size_t>(run.iterations); ++k) {
    double end_s = 0;
    for (const auto& rank : ranks) end_s = std::max(end_s, rank->finish_s()[k]);
    result.iteration_s.push_back(end_s - before_s);
    before_s = end_s;
  }
  for (const auto& rank : ranks) rank->add_to(result);
  if (static_cast<std::int64_t>(result.tokens_by_staleness.size()) > policy.max_staleness() + 1)
    fail<InternalError>("simulation: policy ", policy.name(), " used weights ",
                        result.tokens_by_staleness.size() - 1, " versions old, its bound is ",
                        policy.max_staleness());
  return result;
}

double quantile(std::vector<double> values, double share) {
  RLHF_CHECK(!values.empty() && share >= 0 && share <= 1, "quantile ", share, " of ", values.size(),
             " values");
  std::ranges::sort(values);
  const double place = share * static_cast<double>(values.size() - 1);
  const auto below = static_cast<std::size_t>(place);
  const std::size_t above = std::min(below + 1, values.size() - 1);
  return values[below] + (place - static_cast<double>(below)) * (values[above] - values[below]);
}

std::size_t recommend(const std::vector<Simulation>& by_staleness, double tolerance) {
  RLHF_CHECK(!by_staleness.empty(), "recommend: no simulation");
  double best = 0;
  for (const Simulation& s : by_staleness) best = std::max(best, s.samples_per_s());
  std::size_t i = 0;
  while (by_staleness[i].samples_per_s() < (1 - tolerance) * best) ++i;
  return i;
}

}  // namespace rlhf::schedule

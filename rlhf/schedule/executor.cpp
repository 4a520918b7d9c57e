#include "rlhf/schedule/executor.h"

#include <array>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

#include "rlhf/core/error.h"

namespace rlhf::schedule {
namespace {

// One run. The mutex guards everything but the workload, whose functions run without it.
class Run {
 public:
  Run(const Policy& policy, Workload& workload, const ExecutorOptions& options)
      : policy_(policy),
        workload_(workload),
        options_(options),
        progress_(workload, options.first, options.last, options.published),
        iteration_begin_s_(options.clock()) {
    wait_begin_s_.fill(iteration_begin_s_);
  }

  void run() {
    if (policy_.overlaps())
      run_two_lanes();
    else
      run_one_lane();
    if (error_) std::rethrow_exception(error_);
  }

 private:
  using Lock = std::unique_lock<std::mutex>;

  void run_one_lane() {
    Lock lock(mutex_);
    while (!progress_.done() && !error_) {
      bool acted = false;
      for (const Lane lane : kAllLanes) acted |= act(lane, lock);
      if (!acted) stop_stuck();
    }
  }

  void run_two_lanes() {
    std::thread generator([this] { run_lane(Lane::kGenerate); });
    run_lane(Lane::kTrain);
    generator.join();
  }

  void run_lane(Lane lane) {
    Lock lock(mutex_);
    while (!progress_.done() && !error_) {
      if (act_in(lane, lock)) continue;
      waiting_[index(lane)] = true;
      if (waiting_[0] && waiting_[1]) {
        stop_stuck();
        break;
      }
      changed_[index(lane)].wait(lock, [&] { return !waiting_[index(lane)]; });
    }
    wake_all();
  }

  // Lanes that only take turns do so on one thread: handing over to another one costs more than a small task.
  bool act_in(Lane lane, Lock& lock) {
    if (progress_.overlap_pays()) return act(lane, lock);
    if (lane == Lane::kGenerate) return false;
    return act(Lane::kTrain, lock) || (!busy_[index(Lane::kGenerate)] && act(Lane::kGenerate, lock));
  }

  void stop_stuck() {
    error_ = std::make_exception_ptr(InternalError(concat(
        "schedule: policy ", policy_.name(), " leaves both lanes waiting: ", progress_.generated(),
        " iterations generated, ", progress_.trained(), " trained, ", progress_.published(), " published")));
    wake_all();
  }

  void wake_all() {
    wake(Lane::kGenerate);
    wake(Lane::kTrain);
  }

  void wake(Lane lane) {
    waiting_[index(lane)] = false;
    changed_[index(lane)].notify_one();
  }

  void wake_those_that_act() {
    if (progress_.overlap_pays()) wake(Lane::kGenerate);
    wake(Lane::kTrain);
  }

  // Runs the next action of a lane, if there is one.
  bool act(Lane lane, Lock& lock) {
    try {
      const auto action = policy_.next(lane, progress_);
      if (!action) return false;
      RLHF_CHECK(lane_of(action->task) == lane, "schedule: ", to_string(action->task), " on the lane ",
                 to_string(lane));
      progress_.check(*action);
      perform(lane, *action, lock);
    } catch (...) {
      if (!lock.owns_lock()) lock.lock();
      if (!error_) error_ = std::current_exception();
      wake_all();
    }
    wake_those_that_act();
    return true;
  }

  void perform(Lane lane, const Action& action, Lock& lock) {
    const double begin_s = options_.clock();
    end_wait(lane, action, begin_s);
    if (action.task == Task::kFinish) return finish(action, begin_s, lock);
    set_busy(lane, true);
    const std::int64_t version = progress_.published();
    lock.unlock();
    std::vector<FinishedSample> finished;
    std::size_t num_ready = 0;
    std::exception_ptr error;
    try {
      if (action.task == Task::kGenerate)
        finished = workload_.generate(action.iteration);
      else
        num_ready = call(action);
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    set_busy(lane, false);
    if (error) std::rethrow_exception(error);
    const double end_s = options_.clock();
    const std::int64_t iteration = action.task == Task::kGenerate ? progress_.generated() : action.iteration;
    if (action.task == Task::kGenerate)
      progress_.record_samples(action, finished);
    else
      progress_.record(action, num_ready);
    times_.task_s[static_cast<std::size_t>(action.task)] += end_s - begin_s;
    wait_begin_s_[index(lane)] = end_s;
    if (options_.sink)
      options_.sink({lane, false, action.task, iteration, begin_s, end_s,
                     action.task == Task::kGenerate ? finished.size() : action.samples.size(), version});
  }

  // Calls the workload; returns the micro-batches that may be trained now, where that changed.
  std::size_t call(const Action& action) {
    const std::int64_t k = action.iteration;
    switch (action.task) {
      case Task::kScore:
        workload_.score(k, action.samples);
        return 0;
      case Task::kAdvantage:
        workload_.compute_advantages(k, action.samples);
        return workload_.num_micro_batches(k, 0);
      case Task::kTrain:
        workload_.train(k, action.step, action.micro_batch);
        return 0;
      case Task::kOptimize:
        workload_.optimize(k, action.step);
        return action.step + 1 < workload_.num_optimizer_steps()
                   ? workload_.num_micro_batches(k, action.step + 1)
                   : 0;
      case Task::kPublish:
        workload_.publish(k);
        return 0;
      default:
        fail<InternalError>("schedule: ", to_string(action.task), " is not a task of the train lane");
    }
  }

  // The times of an iteration are complete when it is reported, so what the report takes goes to the next.
  void finish(const Action& action, double begin_s, Lock& lock) {
    IterationTimes times = times_;
    times.wall_s = begin_s - iteration_begin_s_;
    times_ = {};
    iteration_begin_s_ = begin_s;
    lock.unlock();
    workload_.finish(action.iteration, times);
    lock.lock();
    progress_.record(action, 0);
    const double end_s = options_.clock();
    wait_begin_s_[index(Lane::kTrain)] = end_s;
    if (options_.sink)
      options_.sink(
          {Lane::kTrain, false, action.task, action.iteration, begin_s, end_s, 0, progress_.published()});
  }

  // A lane that takes up work has waited since its last.
  void end_wait(Lane lane, const Action& action, double now_s) {
    const double begin_s = wait_begin_s_[index(lane)];
    if (!policy_.overlaps() || now_s <= begin_s) return;
    times_.wait_s[index(lane)] += now_s - begin_s;
    if (options_.sink)
      options_.sink({lane, true, action.task, action.iteration, begin_s, now_s, 0, progress_.published()});
  }

  void set_busy(Lane lane, bool busy) {
    busy_[index(lane)] = busy;
    workload_.lanes_changed(busy_[index(Lane::kGenerate)], busy_[index(Lane::kTrain)]);
  }

  static std::size_t index(Lane lane) { return static_cast<std::size_t>(lane); }

  const Policy& policy_;
  Workload& workload_;
  const ExecutorOptions& options_;
  std::mutex mutex_;
  std::array<std::condition_variable, 2> changed_;
  Progress progress_;
  std::exception_ptr error_;
  std::array<bool, 2> waiting_{}, busy_{};
  std::array<double, 2> wait_begin_s_{};
  double iteration_begin_s_;
  IterationTimes times_;
};

}  // namespace

void run(const Policy& policy, Workload& workload, const ExecutorOptions& options) {
  Run(policy, workload, options).run();
}

}  // namespace rlhf::schedule

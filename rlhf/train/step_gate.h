#pragma once

#include <atomic>
#include <condition_variable>
#include <mutex>

namespace rlhf {

/// Who may touch the rollout engine: the generate lane, step by step, or another lane between two steps. The
/// generate lane gives way: an asker waits for the step that is running, never for a second one.
class StepGate {
 public:
  /// The generate lane's turn. Waits while others ask.
  std::unique_lock<std::mutex> step() {
    std::unique_lock lock(mutex_);
    served_.wait(lock, [this] { return num_asking_ == 0; });
    return lock;
  }
  /// Calls `fn` between two steps, from a lane that is in none.
  template <class Fn>
  void between_steps(const Fn& fn) {
    ++num_asking_;
    const std::lock_guard lock(mutex_);
    const Served served{this};
    fn();
  }

 private:
  // Counts down under the mutex, whatever fn throws: no wake-up is lost.
  struct Served {
    StepGate* gate;
    ~Served() {
      --gate->num_asking_;
      gate->served_.notify_one();
    }
  };

  std::mutex mutex_;
  std::condition_variable served_;
  std::atomic<int> num_asking_{0};
};

}  // namespace rlhf

#pragma once

#include <atomic>

namespace rlhf::schedule {

/// How two busy lanes split the cores: half and half at first, then so that neither keeps the other waiting.
/// Results do not depend on it. `observe` is called from one thread, the others from any.
class ThreadShare {
 public:
  /// @param threads of both lanes together, at least 1; with one each lane has it
  explicit ThreadShare(int threads);

  int generate() const { return generate_.load(std::memory_order_relaxed); }
  int train() const;

  /// Moves one thread when the slower lane would gain by it, taking the work of a lane in an iteration to
  /// last in inverse proportion to its threads.
  /// @param generate_busy_s, train_busy_s seconds of an iteration that the lanes did not wait
  void observe(double generate_busy_s, double train_busy_s);

 private:
  int threads_;
  std::atomic<int> generate_;
};

}  // namespace rlhf::schedule

#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace rlhf {

/// A fixed set of threads that run index ranges. Idle workers spin for some microseconds and then park, so
/// that a busy neighbour does not make short parallel regions collapse (spinning barriers cost 15x on a
/// shared machine). The calling thread takes part in the work. One caller at a time; a nested call runs in
/// the calling thread.
class ThreadPool {
 public:
  /// @param num_threads total threads including the caller; 0 means one per available core.
  explicit ThreadPool(int num_threads = 0);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  /// Threads that take part from the next region on, 1 to num_threads(), so that two pools can share the
  /// cores. May be called from any thread. Results of a region do not depend on it.
  void set_active_threads(int count) { active_.store(count, std::memory_order_relaxed); }

  /// Calls `fn(begin, end)` on disjoint ranges of at most `grain` indices that cover [0, count). Which thread
  /// runs which range is not fixed, so `fn` must not depend on it. The first exception is rethrown to the
  /// caller.
  template <class Fn>
  void parallel_for(std::int64_t count, std::int64_t grain, Fn&& fn) {
    if (count <= 0) return;
    if (grain < 1) grain = 1;
    if (active_.load(std::memory_order_relaxed) <= 1 || count <= grain || in_region_) {
      for (std::int64_t begin = 0; begin < count; begin += grain)
        fn(begin, begin + grain < count ? begin + grain : count);
      return;
    }
    auto call = [](void* context, std::int64_t begin, std::int64_t end) {
      (*static_cast<std::remove_reference_t<Fn>*>(context))(begin, end);
    };
    run(count, grain, call, const_cast<void*>(static_cast<const void*>(std::addressof(fn))));
  }

 private:
  using Call = void (*)(void*, std::int64_t, std::int64_t);

  void run(std::int64_t count, std::int64_t grain, Call call, void* context);
  void worker_loop(int index);
  void take_ranges();

  std::vector<std::thread> workers_;
  std::atomic<std::uint32_t> generation_{0};
  std::atomic<int> running_{0};
  std::atomic<bool> stopping_{false};
  std::atomic<int> active_{1};
  int taking_part_ = 1;  ///< threads of the region that runs now
  std::atomic<std::int64_t> next_{0};
  std::int64_t count_ = 0;
  std::int64_t grain_ = 1;
  Call call_ = nullptr;
  void* context_ = nullptr;
  std::mutex error_mutex_;
  std::exception_ptr error_;
  static thread_local bool in_region_;
};

}  // namespace rlhf

#include "rlhf/core/thread_pool.h"

#include <algorithm>
#include <utility>

#include "rlhf/core/error.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace rlhf {
namespace {

// About 20 microseconds: longer than the gap between two kernels of one layer, shorter than a time slice.
constexpr int kSpins = 2000;

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

template <class T>
void wait_while_equal(const std::atomic<T>& value, T old) {
  for (int i = 0; i < kSpins; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    relax();
  }
  value.wait(old, std::memory_order_acquire);
}

}  // namespace

thread_local bool ThreadPool::in_region_ = false;

ThreadPool::ThreadPool(int num_threads) {
  RLHF_CHECK(num_threads >= 0 && num_threads <= 1024, "ThreadPool: num_threads is ", num_threads,
             ", expected 0 (all cores) to 1024");
  if (num_threads == 0) num_threads = std::max(1u, std::thread::hardware_concurrency());
  active_ = num_threads;
  for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this, i] { worker_loop(i); });
}

ThreadPool::~ThreadPool() {
  stopping_.store(true, std::memory_order_release);
  generation_.fetch_add(1, std::memory_order_acq_rel);
  generation_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void ThreadPool::take_ranges() {
  in_region_ = true;
  for (;;) {
    const std::int64_t begin = next_.fetch_add(grain_, std::memory_order_relaxed);
    if (begin >= count_) break;
    try {
      call_(context_, begin, std::min(count_, begin + grain_));
    } catch (...) {
      std::lock_guard lock(error_mutex_);
      if (!error_) error_ = std::current_exception();
      next_.store(count_, std::memory_order_relaxed);
    }
  }
  in_region_ = false;
}

void ThreadPool::worker_loop(int index) {
  std::uint32_t seen = 0;
  for (;;) {
    wait_while_equal(generation_, seen);
    seen = generation_.load(std::memory_order_acquire);
    if (stopping_.load(std::memory_order_acquire)) return;
    if (index < taking_part_) take_ranges();
    if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) running_.notify_one();
  }
}

void ThreadPool::run(std::int64_t count, std::int64_t grain, Call call, void* context) {
  count_ = count;
  grain_ = grain;
  call_ = call;
  context_ = context;
  taking_part_ = active_.load(std::memory_order_relaxed);
  next_.store(0, std::memory_order_relaxed);
  running_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_acq_rel);
  generation_.notify_all();
  take_ranges();
  for (int left = running_.load(std::memory_order_acquire); left != 0;
       left = running_.load(std::memory_order_acquire))
    wait_while_equal(running_, left);
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

}  // namespace rlhf

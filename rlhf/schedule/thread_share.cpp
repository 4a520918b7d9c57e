#include "rlhf/schedule/thread_share.h"

#include <algorithm>

#include "rlhf/core/error.h"

namespace rlhf::schedule {
namespace {

// Whether both lanes end earlier when the slower one gets a thread of the faster one.
bool gains(double slower_s, double faster_s, int faster_threads) {
  return faster_threads > 1 && faster_s * faster_threads / (faster_threads - 1) < slower_s;
}

}  // namespace

ThreadShare::ThreadShare(int threads) : threads_(threads), generate_(std::max(1, threads / 2)) {
  RLHF_CHECK(threads >= 1, "ThreadShare: ", threads, " threads, expected at least 1");
}

int ThreadShare::train() const {
  return std::max(1, threads_ - generate());
}

void ThreadShare::observe(double generate_busy_s, double train_busy_s) {
  const int generate_threads = generate();
  if (gains(generate_busy_s, train_busy_s, train()))
    generate_ = generate_threads + 1;
  else if (gains(train_busy_s, generate_busy_s, generate_threads))
    generate_ = generate_threads - 1;
}

}  // namespace rlhf::schedule

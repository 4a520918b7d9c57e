#include "rlhf/kernels/machine_rates.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <numeric>

#include "rlhf/tensor/buffer.h"

namespace rlhf {
namespace {

// Runs work a few times and returns the shortest time, in seconds.
template <class Work>
double shortest(int passes, const Work& work) {
  double best = 1e30;
  for (int pass = 0; pass < passes; ++pass) {
    const auto begin = std::chrono::steady_clock::now();
    work();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  }
  return best;
}

}  // namespace

double product_flops_per_s(const Compute<float>& compute) {
  constexpr std::int64_t M = 512, N = 1024, K = 1024;
  Buffer<float> x(M * K), w(N * K), y(M * N);
  std::fill(x.begin(), x.end(), 1.0f);
  std::fill(w.begin(), w.end(), 0.5f);
  const double seconds = shortest(5, [&] {
    compute.linear({x.data(), K, w.data(), nullptr, y.data(), N, K, false}, M, N);
  });
  return 2.0 * M * N * K / seconds;
}

double read_bytes_per_s(const Compute<float>& compute) {
  constexpr std::int64_t kCount = std::int64_t{1} << 25, kPiece = std::int64_t{1} << 17;
  constexpr int kSums = 16;
  Buffer<std::uint64_t> memory(static_cast<std::size_t>(kCount));
  // Untouched memory is all one page of zeros.
  compute.pool().parallel_for(kCount, kPiece, [&](std::int64_t begin, std::int64_t end) {
    std::fill(memory.data() + begin, memory.data() + end, std::uint64_t{1});
  });
  std::atomic<std::uint64_t> total{0};  // keeps the reads
  const double seconds = shortest(8, [&] {
    compute.pool().parallel_for(kCount, kPiece, [&](std::int64_t begin, std::int64_t end) {
      std::uint64_t sums[kSums] = {};
      for (const std::uint64_t* at = memory.data() + begin; at < memory.data() + end; at += kSums)
        for (int i = 0; i < kSums; ++i) sums[i] += at[i];
      total += std::accumulate(sums, sums + kSums, std::uint64_t{0});
    });
  });
  return total > 0 ? static_cast<double>(memory.bytes()) / seconds : 0;
}

}  // namespace rlhf

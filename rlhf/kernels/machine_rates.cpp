#include "rlhf/kernels/machine_rates.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <numeric>
#include <vector>

#include "rlhf/core/random.h"
#include "rlhf/kernels/accelerator.h"
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

// Random numbers: a GPU multiplies zeros and ones faster.
template <class T>
std::vector<T> random_values(std::size_t count) {
  RandomStream random(1);
  std::vector<T> values(count);
  for (T& value : values) value = from_float<T>(static_cast<float>(random.uniform() - 0.5));
  return values;
}

double accelerator_flops_per_s(const Accelerator& accelerator) {
  if (accelerator.flops_per_s > 0) return accelerator.flops_per_s;
  constexpr std::int64_t kSize = 4096, kRepeats = 10;
  DeviceMemory& memory = *accelerator.memory;
  const std::vector<Bfloat16> values = random_values<Bfloat16>(kSize * kSize);
  DeviceBuffer<Bfloat16> x(memory, values), w(memory, values), y(memory, values.size());
  const double seconds = shortest(4, [&] {
    for (std::int64_t i = 0; i < kRepeats; ++i)
      accelerator.kernels->linear({x.data(), kSize, w.data(), nullptr, y.data(), kSize, kSize, false}, kSize,
                                  kSize, memory.queue());
    memory.synchronize();
  });
  return 2.0 * kSize * kSize * kSize * kRepeats / seconds;
}

// By copying inside the device, which reads and writes.
double accelerator_bytes_per_s(const Accelerator& accelerator) {
  constexpr std::size_t kBytes = std::size_t{1} << 30;
  DeviceMemory& memory = *accelerator.memory;
  DeviceBuffer<std::byte> from(memory, kBytes), to(memory, kBytes);
  const double seconds = shortest(6, [&] {
    memory.copy(to.data(), from.data(), kBytes);
    memory.synchronize();
  });
  return 2.0 * static_cast<double>(kBytes) / seconds;
}

}  // namespace

double product_flops_per_s(const Compute<float>& compute) {
  if (compute.accelerator()) return accelerator_flops_per_s(*compute.accelerator());
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
  if (compute.accelerator()) return accelerator_bytes_per_s(*compute.accelerator());
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

#pragma once
// Top-k, top-p and min-p of rows of logits. A block has a row and never sorts it: it finds the logit at which
// a count, or a mass, from the top reaches its target, four bits of the logit a pass (eight passes), with a
// histogram of 16 bins a thread. Then it removes what lies below. Bound: some twenty reads of the row, mostly
// from the second-level cache.

#include <cmath>

#include "rlhf/kernels/cuda/logits.cuh"

namespace rlhf::kernels::RLHF_GPU {

constexpr int kFilterBits = 4, kFilterBins = 1 << kFilterBits;

/// A number for every logit, in the order of the logits; equal for both zeros.
__device__ inline std::uint32_t order_key(float logit) {
  const std::uint32_t bits = __builtin_bit_cast(std::uint32_t, logit + 0.0F);
  return (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
}

struct FilterShared {
  float* bins;         ///< [kFilterBins, threads]
  double* sums;        ///< [kFilterBins]
  double* scratch;     ///< [warps]
  std::int64_t* ties;  ///< [threads]
};
constexpr std::size_t kFilterSharedBytes = kFilterBins * kLogitsThreads * sizeof(float) +
                                           (kFilterBins + kLogitsWarps) * sizeof(double) +
                                           kLogitsThreads * sizeof(std::int64_t);
__device__ inline FilterShared filter_shared() {
  double* const sums = block_shared<double>();
  double* const scratch = sums + kFilterBins;
  auto* const ties = reinterpret_cast<std::int64_t*>(scratch + kLogitsWarps);
  return {reinterpret_cast<float*>(ties + kLogitsThreads), sums, scratch, ties};
}

/// One pass: sums[b] = weights of the tokens whose key begins with `prefix` and goes on with b.
template <class Weigh>
__device__ inline void weigh_bins(const float* row, std::int64_t V, int shift, std::uint32_t prefix,
                                  FilterShared shared, const Weigh& weigh) {
  float* const mine = shared.bins + threadIdx.x;
  for (int b = 0; b < kFilterBins; ++b) mine[b * kLogitsThreads] = 0;
  for (std::int64_t i = threadIdx.x; i < V; i += kLogitsThreads) {
    const std::uint32_t key = order_key(row[i]);
    if (shift + kFilterBits < 32 && key >> (shift + kFilterBits) != prefix) continue;
    mine[static_cast<int>(key >> shift & (kFilterBins - 1)) * kLogitsThreads] += weigh(row[i], key);
  }
  __syncthreads();
  for (int b = warp_id(); b < kFilterBins; b += kLogitsWarps) {
    double sum = 0;
    for (int i = lane_id(); i < kLogitsThreads; i += kWarp)
      sum += static_cast<double>(shared.bins[b * kLogitsThreads + i]);
    sum = warp_sum(sum);
    if (lane_id() == 0) shared.sums[b] = sum;
  }
  __syncthreads();
}

/// The key at which the weights from the largest logit down reach the target, and those above it. When they
/// never do, the smallest key that weighs anything.
struct Cut {
  std::uint32_t key = 0;
  double above = 0, target = 0;
};
/// @param target of the weights; as a share of all of them where `is_share`
template <class Weigh>
__device__ inline Cut find_cut(const float* row, std::int64_t V, double target, bool is_share,
                               FilterShared shared, const Weigh& weigh) {
  Cut cut;
  cut.target = target;
  for (int shift = 32 - kFilterBits; shift >= 0; shift -= kFilterBits) {
    weigh_bins(row, V, shift, cut.key, shared, weigh);
    if (is_share && shift == 32 - kFilterBits) {
      double all = 0;
      for (int b = kFilterBins - 1; b >= 0; --b) all += shared.sums[b];
      cut.target = target * all;
    }
    int chosen = -1;
    double above = cut.above;
    for (int b = kFilterBins - 1; b >= 0; --b) {
      if (shared.sums[b] <= 0) continue;
      chosen = b;
      cut.above = above;
      above += shared.sums[b];
      if (above >= cut.target) break;
    }
    cut.key = cut.key << kFilterBits | static_cast<std::uint32_t>(chosen < 0 ? 0 : chosen);
    __syncthreads();
  }
  return cut;
}

/// What a row keeps: keys above `key`, the first `ties` tokens at it, and none whose x lies below `least_x`.
struct Kept {
  std::uint32_t key = 0;
  std::int64_t ties = INT64_MAX;
  double least_x = -INFINITY;
};

/// Every thread has consecutive tokens, so that tokens at the cut are counted in ascending order.
__device__ inline void remove_others(float* row, std::int64_t V, float largest, float scale, Kept kept,
                                     std::int64_t* ties) {
  const std::int64_t share = ceil_div(V, kLogitsThreads), begin = threadIdx.x * share,
                     end = begin + share < V ? begin + share : V;
  std::int64_t count = 0;
  for (std::int64_t i = begin; i < end; ++i) count += order_key(row[i]) == kept.key;
  ties[threadIdx.x] = count;
  __syncthreads();
  std::int64_t before = 0;
  for (unsigned t = 0; t < threadIdx.x; ++t) before += ties[t];
  for (std::int64_t i = begin; i < end; ++i) {
    const std::uint32_t key = order_key(row[i]);
    const bool stays = key > kept.key || (key == kept.key && before < kept.ties);
    before += key == kept.key;
    if (!stays || static_cast<double>((row[i] - largest) * scale) < kept.least_x) row[i] = -INFINITY;
  }
}

template <class T>
__global__ void filter_kernel(FilterArgs<T> args) {
  const FilterShared shared = filter_shared();
  const RowFilter filter = args.filters[blockIdx.x];
  if (!filter.removes()) return;
  float* const row = args.logits + matrix_offset(blockIdx.x, 0, args.V);
  const float scale = static_cast<float>(args.keys[blockIdx.x].inv_temperature);
  float largest = -INFINITY, any_nan = 0;
  for (std::int64_t i = threadIdx.x; i < args.V; i += kLogitsThreads) {
    largest = fmaxf(largest, row[i]);
    if (row[i] != row[i]) any_nan = 1;
  }
  largest = warp_max(largest);
  any_nan = warp_max(any_nan);
  if (lane_id() == 0) shared.scratch[warp_id()] = any_nan > 0 ? NAN : static_cast<double>(largest);
  __syncthreads();
  double maximum = shared.scratch[0];
  for (int w = 1; w < kLogitsWarps; ++w)  // a NaN stays
    maximum =
        shared.scratch[w] > maximum || shared.scratch[w] != shared.scratch[w] ? shared.scratch[w] : maximum;
  __syncthreads();
  if (!(maximum - maximum == 0)) {  // nothing can be drawn: as it is, for the draw to say so
    if (threadIdx.x == 0) args.lse[blockIdx.x] = NAN;
    return;
  }
  largest = static_cast<float>(maximum);
  float sum = 0;
  for (std::int64_t i = threadIdx.x; i < args.V; i += kLogitsThreads) sum += expf((row[i] - largest) * scale);
  const double total = block_sum(static_cast<double>(sum), shared.scratch);
  if (threadIdx.x == 0) args.lse[blockIdx.x] = maximum * static_cast<double>(scale) + log(total);

  Kept kept;
  kept.least_x = filter.log_min_p;
  if (filter.top_k > 0 && filter.top_k < args.V)
    kept.key = find_cut(row, args.V, static_cast<double>(filter.top_k), false, shared,
                        [](float logit, std::uint32_t) { return logit == -INFINITY ? 0.0F : 1.0F; })
                   .key;
  if (filter.top_p < 1) {
    const std::uint32_t least = kept.key;
    const Cut cut = find_cut(row, args.V, filter.top_p, true, shared, [&](float logit, std::uint32_t key) {
      return key < least ? 0.0F : expf((logit - largest) * scale);
    });
    kept.key = cut.key;
    // Back from the key to the logit, and to what each token there weighs.
    const std::uint32_t bits = (cut.key & 0x80000000U) != 0 ? cut.key & 0x7FFFFFFFU : ~cut.key;
    const double weight = static_cast<double>(expf((__builtin_bit_cast(float, bits) - largest) * scale));
    const double wanted = weight > 0 ? ceil((cut.target - cut.above) / weight) : 1;
    kept.ties = wanted < 1 ? 1 : wanted < 1e15 ? static_cast<std::int64_t>(wanted) : INT64_MAX;
  }
  remove_others(row, args.V, largest, scale, kept, shared.ties);
}

template <class T>
void filter(const FilterArgs<T>& args, std::int64_t rows, void* queue) {
  launch("filter", filter_kernel<T>, dim3(static_cast<unsigned>(rows)), kLogitsThreads, kFilterSharedBytes,
         queue, args);
}

}  // namespace rlhf::kernels::RLHF_GPU

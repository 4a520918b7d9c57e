#pragma once
// Top-k, top-p and min-p of rows of logits. A block has a row and never sorts it: it finds the logit at which
// a count, or a mass, from the top reaches its target, four bits of the logit a pass, with a histogram of 16
// bins a thread. After three passes over the row the tokens that are left are usually few and move to shared
// memory. Then it removes what lies below. Bound: some eight reads of the row, mostly from the second-level
// cache.

#include <cmath>

#include "rlhf/kernels/cuda/logits.cuh"

namespace rlhf::kernels::RLHF_GPU {

constexpr int kFilterBits = 4, kFilterBins = 1 << kFilterBits, kCoarseDigits = 3;
constexpr int kFilterThreads = 512, kFilterWarps = kFilterThreads / kWarp;

/// A number for every logit, in the order of the logits; equal for both zeros.
__device__ inline std::uint32_t order_key(float logit) {
  const std::uint32_t bits = __builtin_bit_cast(std::uint32_t, logit + 0.0F);
  return (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
}
__device__ inline float logit_of_key(std::uint32_t key) {
  return __builtin_bit_cast(float, (key & 0x80000000U) != 0 ? key & 0x7FFFFFFFU : ~key);
}

/// Candidates lie where the bins of most threads were: few tokens need few threads.
constexpr int kFewThreadsBins = 128, kSlots = 12;
struct FilterShared {
  float* bins;                ///< [kFilterBins, threads]
  std::uint32_t* candidates;  ///< [kSlots, kFilterThreads] keys; 0 = empty
  double* sums;               ///< [kFilterBins]
  double* scratch;            ///< [warps]
};
static_assert(kFewThreadsBins * kFilterBins + kSlots * kFilterThreads <= kFilterBins * kFilterThreads);
constexpr std::size_t kFilterSharedBytes =
    kFilterBins * kFilterThreads * sizeof(float) + (kFilterBins + kFilterWarps) * sizeof(double);
__device__ inline FilterShared filter_shared() {
  double* const sums = block_shared<double>();
  double* const scratch = sums + kFilterBins;
  auto* const bins = reinterpret_cast<float*>(scratch + kFilterWarps);
  return {bins, reinterpret_cast<std::uint32_t*>(bins + kFewThreadsBins * kFilterBins), sums, scratch};
}

/// The tokens of a row. Calls fn(logit, place) with 16 bytes per access where the row allows it.
struct RowTokens {
  float* row;
  std::int64_t V;
  static constexpr int kThreads = kFilterThreads;

  template <class Fn>
  __device__ void for_each(const Fn& fn) const {
    constexpr int kAtOnce = 4;
    const bool wide = is_wide(row);
    constexpr std::int64_t kStep = kFilterThreads * kVector<float>;
    for (std::int64_t begin = threadIdx.x * kVector<float>; begin < V; begin += kAtOnce * kStep) {
      Words words[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        words[i] = load_elements(row + begin + i * kStep, V - begin - i * kStep, wide);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
        for (int j = 0; j < kVector<float>; ++j)
          if (begin + i * kStep + j < V) fn(element<float>(words[i], j), begin + i * kStep + j);
    }
  }
};
/// Those that a search is left with, in shared memory.
struct CandidateTokens {
  const std::uint32_t* keys;
  static constexpr int kThreads = kFewThreadsBins;

  template <class Fn>
  __device__ void for_each(const Fn& fn) const {
    if (threadIdx.x >= kThreads) return;
    for (int i = static_cast<int>(threadIdx.x); i < kSlots * kFilterThreads; i += kThreads)
      if (keys[i] != 0) fn(logit_of_key(keys[i]), std::int64_t{i});
  }
};

/// One pass: sums[b] = weights of the tokens whose key begins with `prefix` and goes on with b.
template <class Tokens, class Weigh>
__device__ inline void weigh_bins(const Tokens& tokens, int shift, std::uint32_t prefix, FilterShared shared,
                                  const Weigh& weigh) {
  constexpr int kThreads = Tokens::kThreads;
  float* const mine = shared.bins + threadIdx.x;
  if (threadIdx.x < kThreads)
    for (int b = 0; b < kFilterBins; ++b) mine[b * kThreads] = 0;
  tokens.for_each([&](float logit, std::int64_t) {
    const std::uint32_t key = order_key(logit);
    if (shift + kFilterBits < 32 && key >> (shift + kFilterBits) != prefix) return;
    mine[static_cast<int>(key >> shift & (kFilterBins - 1)) * kThreads] += weigh(logit, key);
  });
  __syncthreads();
  for (int b = warp_id(); b < kFilterBins; b += kFilterWarps) {
    double sum = 0;
    for (int i = lane_id(); i < kThreads; i += kWarp)
      sum += static_cast<double>(shared.bins[b * kThreads + i]);
    sum = warp_sum(sum);
    if (lane_id() == 0) shared.sums[b] = sum;
  }
  __syncthreads();
}

/// The search for the key at which the weights from the largest logit down reach the target: the digits of
/// the key that are found, and the weights above them. When they never do, the smallest key that weighs
/// anything.
struct Cut {
  std::uint32_t key = 0;
  int digits = 0;
  double above = 0, target = 0;
};
/// Finds digits up to number `digits`.
/// @param share of all weights that is the target, set with the first digit; 0 = cut.target is set
template <class Tokens, class Weigh>
__device__ inline void find_cut(Cut& cut, int digits, const Tokens& tokens, double share, FilterShared shared,
                                const Weigh& weigh) {
  for (; cut.digits < digits; ++cut.digits) {
    weigh_bins(tokens, 32 - kFilterBits * (cut.digits + 1), cut.key, shared, weigh);
    if (share > 0 && cut.digits == 0) {
      double all = 0;
      for (int b = kFilterBins - 1; b >= 0; --b) all += shared.sums[b];
      cut.target = share * all;
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
}
constexpr int kAllDigits = 32 / kFilterBits;

/// Brings the keys of at least `least` to shared memory. @return false when a thread has too many of them
__device__ inline bool gather_candidates(const RowTokens& tokens, std::uint32_t least, FilterShared shared) {
  std::uint32_t* const mine = shared.candidates + threadIdx.x;
  for (int i = 0; i < kSlots; ++i) mine[i * kFilterThreads] = 0;
  int count = 0;
  tokens.for_each([&](float logit, std::int64_t) {
    const std::uint32_t key = order_key(logit);
    if (key < least) return;
    if (count < kSlots) mine[count * kFilterThreads] = key;
    ++count;
  });
  return block_sum(count > kSlots ? 1.0 : 0.0, shared.scratch) == 0;
}

/// What a row keeps: keys above `key`, the first `ties` tokens at it, and none whose x lies below `least_x`.
struct Kept {
  std::uint32_t key = 0;
  std::int64_t ties = INT64_MAX;
  double least_x = -INFINITY;
};

__device__ inline void remove_others(const RowTokens& tokens, float largest, float scale, Kept kept,
                                     FilterShared shared) {
  const auto too_small = [&](float logit) {
    return static_cast<double>((logit - largest) * scale) < kept.least_x;
  };
  double at_cut = 0;
  if (kept.ties != INT64_MAX) {
    float count = 0;
    tokens.for_each([&](float logit, std::int64_t) { count += order_key(logit) == kept.key ? 1 : 0; });
    at_cut = block_sum(static_cast<double>(count), shared.scratch);
  }
  if (at_cut <= static_cast<double>(kept.ties)) {
    tokens.for_each([&](float logit, std::int64_t place) {
      if (order_key(logit) < kept.key || too_small(logit)) tokens.row[place] = -INFINITY;
    });
    return;
  }
  // Of the tokens at the cut only the first ones stay: every thread has consecutive tokens, to count them in
  // ascending order.
  auto* const ties = reinterpret_cast<std::int64_t*>(shared.bins);
  const std::int64_t share = ceil_div(tokens.V, kFilterThreads), begin = threadIdx.x * share,
                     end = begin + share < tokens.V ? begin + share : tokens.V;
  std::int64_t count = 0;
  for (std::int64_t i = begin; i < end; ++i) count += order_key(tokens.row[i]) == kept.key;
  ties[threadIdx.x] = count;
  __syncthreads();
  std::int64_t before = 0;
  for (unsigned t = 0; t < threadIdx.x; ++t) before += ties[t];
  for (std::int64_t i = begin; i < end; ++i) {
    const float logit = tokens.row[i];
    const std::uint32_t key = order_key(logit);
    const bool stays = key > kept.key || (key == kept.key && before < kept.ties);
    before += key == kept.key;
    if (!stays || too_small(logit)) tokens.row[i] = -INFINITY;
  }
}

struct RowMaximum {
  float largest;
  bool finite;  ///< and no NaN in the row
};
__device__ inline RowMaximum row_maximum(const RowTokens& tokens, double* scratch) {
  float largest = -INFINITY, any_nan = 0;
  tokens.for_each([&](float logit, std::int64_t) {
    largest = fmaxf(largest, logit);
    if (logit != logit) any_nan = 1;
  });
  largest = warp_max(largest);
  any_nan = warp_max(any_nan);
  if (lane_id() == 0) scratch[warp_id()] = any_nan > 0 ? NAN : static_cast<double>(largest);
  __syncthreads();
  double maximum = scratch[0];
  for (int w = 1; w < kFilterWarps; ++w)  // a NaN stays
    maximum = scratch[w] > maximum || scratch[w] != scratch[w] ? scratch[w] : maximum;
  __syncthreads();
  return {static_cast<float>(maximum), maximum - maximum == 0};
}

/// Top-k, then top-p of what it keeps. The first digits are found in the row; the rest among the tokens that
/// they leave, if these are few, as they are unless a distribution is flat.
__device__ inline Kept search(const RowFilter& filter, const RowTokens& tokens, float largest, float scale,
                              FilterShared shared) {
  const bool top_k = filter.top_k > 0 && filter.top_k < tokens.V, top_p = filter.top_p < 1;
  Kept kept;
  kept.least_x = filter.log_min_p;
  if (!top_k && !top_p) return kept;
  const auto one = [](float logit, std::uint32_t) { return logit == -INFINITY ? 0.0F : 1.0F; };
  const auto mass = [&](float logit, std::uint32_t key) {
    return key < kept.key ? 0.0F : expf((logit - largest) * scale);
  };
  Cut by_count, by_mass;
  by_count.target = static_cast<double>(filter.top_k);
  if (top_k)
    find_cut(by_count, kCoarseDigits, tokens, 0, shared, one);
  else
    find_cut(by_mass, kCoarseDigits, tokens, filter.top_p, shared, mass);
  const std::uint32_t coarse = (top_k ? by_count : by_mass).key << (32 - kCoarseDigits * kFilterBits);
  const auto finish = [&](const auto& left) {
    if (top_k) {
      find_cut(by_count, kAllDigits, left, 0, shared, one);
      kept.key = by_count.key;
    }
    if (top_p) find_cut(by_mass, kAllDigits, left, filter.top_p, shared, mass);
  };
  if (gather_candidates(tokens, coarse, shared))
    finish(CandidateTokens{shared.candidates});
  else
    finish(tokens);
  if (!top_p) return kept;
  kept.key = by_mass.key;
  // What each token at the cut weighs says how many of them are needed.
  const double weight = static_cast<double>(expf((logit_of_key(by_mass.key) - largest) * scale));
  const double wanted = weight > 0 ? ceil((by_mass.target - by_mass.above) / weight) : 1;
  kept.ties = wanted < 1 ? 1 : wanted < 1e15 ? static_cast<std::int64_t>(wanted) : INT64_MAX;
  return kept;
}

template <class T>
__global__ void __launch_bounds__(kFilterThreads) filter_kernel(FilterArgs<T> args) {
  const FilterShared shared = filter_shared();
  const RowFilter filter = args.filters[blockIdx.x];
  if (!filter.removes()) return;
  const RowTokens tokens = {args.logits + matrix_offset(blockIdx.x, 0, args.V), args.V};
  const float scale = static_cast<float>(args.keys[blockIdx.x].inv_temperature);
  const auto [largest, finite] = row_maximum(tokens, shared.scratch);
  if (!finite) {  // nothing can be drawn: as it is, for the draw to say so
    if (threadIdx.x == 0) args.lse[blockIdx.x] = NAN;
    return;
  }
  float sum = 0;
  tokens.for_each(
      [&, largest = largest](float logit, std::int64_t) { sum += expf((logit - largest) * scale); });
  const double total = block_sum(static_cast<double>(sum), shared.scratch);
  if (threadIdx.x == 0)
    args.lse[blockIdx.x] = static_cast<double>(largest) * static_cast<double>(scale) + log(total);
  remove_others(tokens, largest, scale, search(filter, tokens, largest, scale, shared), shared);
}

template <class T>
void filter(const FilterArgs<T>& args, std::int64_t rows, void* queue) {
  launch("filter", filter_kernel<T>, dim3(static_cast<unsigned>(rows)), kFilterThreads, kFilterSharedBytes,
         queue, args);
}

}  // namespace rlhf::kernels::RLHF_GPU

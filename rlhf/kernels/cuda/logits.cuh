#pragma once
// Statistics of rows of logits, their gradient, and draws. One block per row of the vocabulary. Statistics
// take one pass: every thread keeps (maximum, sum of e^x, sum of x e^x) online and the block merges them.
// Bound: reading the row.

#include <cmath>

#include "rlhf/core/philox.h"
#include "rlhf/kernels/cuda/reduce.cuh"
#include "rlhf/kernels/device_kernels.h"

namespace rlhf::kernels::RLHF_GPU {

constexpr int kLogitsThreads = 256;
constexpr std::int64_t kDrawTile = 1024;  // tokens whose probabilities are summed together

/// Sums relative to the largest of the numbers seen: of e^(z - maximum) and (z - maximum) e^(z - maximum).
struct SoftmaxSums {
  float maximum, sum, moment;
};

__device__ inline SoftmaxSums merge(SoftmaxSums a, SoftmaxSums b) {
  if (b.sum == 0) return a;  // b has seen nothing
  if (a.sum == 0) return b;
  const float maximum = fmaxf(a.maximum, b.maximum), da = a.maximum - maximum, db = b.maximum - maximum;
  const float ea = expf(da), eb = expf(db);
  return {maximum, a.sum * ea + b.sum * eb, ea * (a.moment + da * a.sum) + eb * (b.moment + db * b.sum)};
}

__device__ inline SoftmaxSums shuffle(SoftmaxSums s, int distance) {
  return {__shfl_xor_sync(kAllLanes, s.maximum, distance), __shfl_xor_sync(kAllLanes, s.sum, distance),
          __shfl_xor_sync(kAllLanes, s.moment, distance)};
}

/// Merges over the block; `scratch` holds one SoftmaxSums per warp. The result is valid in every thread: lane
/// 0's, as merging is not symmetric to the last bit.
__device__ inline SoftmaxSums merge_block(SoftmaxSums s, SoftmaxSums* scratch) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) s = merge(s, shuffle(s, distance));
  if (lane_id() == 0) scratch[warp_id()] = s;
  __syncthreads();
  s = scratch[0];
  for (int warp = 1; warp < num_warps(); ++warp) s = merge(s, scratch[warp]);
  return s;
}

/// Adds z to a thread's own sums. -inf adds nothing.
__device__ inline void add(SoftmaxSums& s, float z) {
  if (z == -INFINITY) return;
  if (z > s.maximum) {
    const float d = s.maximum - z, e = s.sum == 0 ? 0 : expf(d);
    s = {z, s.sum * e + 1, s.sum == 0 ? 0 : e * (s.moment + d * s.sum)};
    return;
  }
  const float e = expf(z - s.maximum);
  s.sum += e;
  s.moment += e * (z - s.maximum);
}

template <class T>
__global__ void logits_kernel(LogitsArgs<T> args) {
  const std::int64_t row = blockIdx.x;
  float* logits = args.logits + matrix_offset(row, 0, args.V);
  const float cap = static_cast<float>(args.softcap), scale = static_cast<float>(args.inv_temperature);
  SoftmaxSums s = {-INFINITY, 0, 0};
  for (std::int64_t i = threadIdx.x; i < args.V; i += blockDim.x) {
    if (cap > 0) logits[i] = cap * tanhf(logits[i] / cap);
    add(s, logits[i] * scale);
  }
  s = merge_block(s, block_shared<SoftmaxSums>());  // its barrier also makes the capped target visible
  if (threadIdx.x == 0) {
    const double log_sum = log(static_cast<double>(s.sum));
    LogitsRow& out = args.statistics[row];
    out.max = s.maximum;
    out.lse = out.max + log_sum;
    out.entropy = log_sum - static_cast<double>(s.moment) / static_cast<double>(s.sum);
    out.logprob = static_cast<double>(logits[args.targets[row]] * scale - s.maximum) - log_sum;
  }
}

template <class T>
__global__ void logits_grad_kernel(LogitsArgs<T> args) {
  const std::int64_t row = blockIdx.x, target = args.targets[row];
  float* logits = args.logits + matrix_offset(row, 0, args.V);
  const float cap = static_cast<float>(args.softcap), scale = static_cast<float>(args.inv_temperature);
  const float lse = static_cast<float>(args.statistics[row].lse);
  const float entropy = static_cast<float>(args.statistics[row].entropy);
  const float dlogprob = args.dlogprobs[row], dentropy = args.dentropies ? args.dentropies[row] : 0;
  for (std::int64_t i = threadIdx.x; i < args.V; i += blockDim.x) {
    const float log_p = logits[i] * scale - lse;
    float gradient = -expf(log_p) * (dlogprob + dentropy * (log_p + entropy));
    if (i == target) gradient += dlogprob;
    gradient *= scale;
    if (cap > 0) gradient *= 1 - (logits[i] / cap) * (logits[i] / cap);
    logits[i] = gradient;
  }
}

/// Probability of token i, relative to the largest.
__device__ inline float draw_weight(const float* logits, std::int64_t i, float maximum, float scale) {
  return expf((logits[i] - maximum) * scale);  // e^-inf = 0
}

/// The first index in [begin, end) at which `below` plus the weights up to it exceed `target`; the last one
/// with a weight when rounding leaves the target above them all.
__device__ inline std::int64_t invert(const float* logits, std::int64_t begin, std::int64_t end,
                                      float maximum, float scale, double below, double target) {
  std::int64_t last = begin;
  for (std::int64_t i = begin; i < end; ++i) {
    const float weight = draw_weight(logits, i, maximum, scale);
    if (weight <= 0) continue;
    below += static_cast<double>(weight);
    last = i;
    if (below > target) break;
  }
  return last;
}

/// Largest logit of the row and the first token that has it; the maximum is NaN when a logit is.
struct Largest {
  float value;
  std::int64_t token;
};
__device__ inline Largest larger(Largest a, Largest b) {
  if (a.value != a.value) return a;
  if (b.value != b.value || b.value > a.value || (b.value == a.value && b.token < a.token)) return b;
  return a;
}

template <class T>
__global__ void draw_kernel(DrawArgs<T> args) {
  // One array serves in turn as Largest[warps], then as tile sums [tiles] and lane sums [32].
  double* shared = block_shared<double>();
  const std::int64_t row = blockIdx.x, tiles = ceil_div(args.V, kDrawTile);
  const float* logits = args.logits + matrix_offset(row, 0, args.V);
  const DrawKey key = args.keys[row];
  Largest largest = {-INFINITY, 0};
  for (std::int64_t i = threadIdx.x; i < args.V; i += blockDim.x)
    largest = larger(largest, Largest{logits[i], i});
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    largest = larger(largest, Largest{__shfl_xor_sync(kAllLanes, largest.value, distance),
                                      __shfl_xor_sync(kAllLanes, largest.token, distance)});
  auto* warp_largest = reinterpret_cast<Largest*>(shared);
  if (lane_id() == 0) warp_largest[warp_id()] = largest;
  __syncthreads();
  largest = warp_largest[0];
  for (int warp = 1; warp < num_warps(); ++warp) largest = larger(largest, warp_largest[warp]);
  __syncthreads();
  const bool possible = largest.value - largest.value == 0;  // neither NaN nor infinite
  if (!possible || key.greedy) {
    if (threadIdx.x == 0) args.tokens[row] = possible ? static_cast<TokenId>(largest.token) : -1;
    return;
  }
  const float scale = static_cast<float>(key.inv_temperature);
  for (std::int64_t tile = warp_id(); tile < tiles; tile += num_warps()) {
    const std::int64_t end = (tile + 1) * kDrawTile < args.V ? (tile + 1) * kDrawTile : args.V;
    double sum = 0;
    for (std::int64_t i = tile * kDrawTile + lane_id(); i < end; i += kWarp)
      sum += static_cast<double>(draw_weight(logits, i, largest.value, scale));
    sum = warp_sum(sum);
    if (lane_id() == 0) shared[tile] = sum;
  }
  __syncthreads();
  if (warp_id() != 0) return;
  double mass = 0;
  for (std::int64_t tile = 0; tile < tiles; ++tile) mass += shared[tile];
  const double target = to_unit_interval(random_bits_at(key.seed, key.a, key.b, key.c)) * mass;
  // The tile, then the 32 tokens within it, then the token. A tile or lane without weight is never chosen.
  double below = 0, before = 0;
  std::int64_t chosen = 0;
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    if (shared[tile] <= 0) continue;
    chosen = tile;
    before = below;
    below += shared[tile];
    if (below > target) break;
  }
  const std::int64_t begin = chosen * kDrawTile + lane_id() * kWarp, last = chosen * kDrawTile + kDrawTile;
  const std::int64_t end = last < args.V ? last : args.V;
  double lane_sum = 0;
  for (std::int64_t i = begin; i < begin + kWarp && i < end; ++i)
    lane_sum += static_cast<double>(draw_weight(logits, i, largest.value, scale));
  double* lane_sums = shared + tiles;
  lane_sums[lane_id()] = lane_sum;
  __syncwarp();
  if (lane_id() != 0) return;
  std::int64_t lane = 0;
  below = before;
  for (std::int64_t i = 0; i < kWarp; ++i) {
    if (lane_sums[i] <= 0) continue;
    lane = i;
    before = below;
    below += lane_sums[i];
    if (below > target) break;
  }
  const std::int64_t first = chosen * kDrawTile + lane * kWarp;
  args.tokens[row] = static_cast<TokenId>(
      invert(logits, first, first + kWarp < end ? first + kWarp : end, largest.value, scale, before, target));
}

template <class T>
void logits(const LogitsArgs<T>& args, std::int64_t rows, void* queue) {
  launch("logits", logits_kernel<T>, dim3(static_cast<unsigned>(rows)), kLogitsThreads,
         kLogitsThreads / kWarp * sizeof(SoftmaxSums), queue, args);
}
template <class T>
void logits_grad(const LogitsArgs<T>& args, std::int64_t rows, void* queue) {
  launch("logits_grad", logits_grad_kernel<T>, dim3(static_cast<unsigned>(rows)), kLogitsThreads, 0, queue,
         args);
}
template <class T>
void draw(const DrawArgs<T>& args, std::int64_t rows, void* queue) {
  const std::int64_t doubles = ceil_div(args.V, kDrawTile) + kWarp;
  launch("draw", draw_kernel<T>, dim3(static_cast<unsigned>(rows)), kLogitsThreads,
         static_cast<std::size_t>(doubles) * sizeof(double), queue, args);
}

}  // namespace rlhf::kernels::RLHF_GPU

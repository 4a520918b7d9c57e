#pragma once
// Statistics of rows of logits, their gradient, and draws. A row is cut into parts of kLogitsPart tokens,
// counted from token 0, so that few rows also fill the GPU: a block reads its part once, 16 bytes at a time,
// into registers and leaves sums relative to the part's largest logit; a second kernel merges the parts of a
// row in order. What a row gives does not depend on the other rows. Bound: reading the row once.

#include <cmath>

#include "rlhf/core/philox.h"
#include "rlhf/kernels/cuda/wide.cuh"
#include "rlhf/kernels/device_kernels.h"

namespace rlhf::kernels::RLHF_GPU {

constexpr int kLogitsThreads = 256, kLogitsWarps = kLogitsThreads / kWarp;
constexpr int kThreadLogits = static_cast<int>(kLogitsPart) / kLogitsThreads;
constexpr int kLogitsVectors = kThreadLogits / kVector<float>;
static_assert(kLogitsVectors * kVector<float> * kLogitsThreads == kLogitsPart);

/// A thread's share of a part: vector i of its logits starts at first + i * step.
struct PartShare {
  std::int64_t first, step, count;  ///< count: tokens of the whole part
};
/// Neighbouring threads at neighbouring vectors: what memory likes.
__device__ inline PartShare interleaved_share(std::int64_t count) {
  return {static_cast<std::int64_t>(threadIdx.x) * kVector<float>, kLogitsThreads * kVector<float>, count};
}
/// Every thread at consecutive tokens: what a search in ascending order needs.
__device__ inline PartShare consecutive_share(std::int64_t count) {
  return {static_cast<std::int64_t>(threadIdx.x) * kThreadLogits, kVector<float>, count};
}

/// Tokens of part number `part` of a row.
__device__ inline std::int64_t part_tokens(std::int64_t V, std::int64_t part) {
  const std::int64_t left = V - part * kLogitsPart;
  return left < kLogitsPart ? left : kLogitsPart;
}

/// Loads the share; -inf beyond the end of the part.
__device__ inline void load_share(float (&values)[kThreadLogits], const float* part, PartShare share) {
  const bool wide = is_wide(part);
  Words words[kLogitsVectors];
#pragma unroll
  for (int i = 0; i < kLogitsVectors; ++i) {
    const std::int64_t at = share.first + i * share.step;
    words[i] = load_elements(part + at, share.count - at, wide);
  }
#pragma unroll
  for (int i = 0; i < kThreadLogits; ++i) {
    const std::int64_t at = share.first + i / kVector<float> * share.step + i % kVector<float>;
    values[i] = at < share.count ? element<float>(words[i / kVector<float>], i % kVector<float>) : -INFINITY;
  }
}

__device__ inline void store_share(float* part, const float (&values)[kThreadLogits], PartShare share) {
  const bool wide = is_wide(part);
#pragma unroll
  for (int i = 0; i < kLogitsVectors; ++i) {
    const std::int64_t at = share.first + i * share.step;
    if (wide && at + kVector<float> <= share.count) {
      Words words;
#pragma unroll
      for (int j = 0; j < kVector<float>; ++j)
        words.at[j] = __builtin_bit_cast(std::uint32_t, values[i * kVector<float> + j]);
      store_words(part + at, words);
      continue;
    }
#pragma unroll
    for (int j = 0; j < kVector<float>; ++j)
      if (at + j < share.count) part[at + j] = values[i * kVector<float> + j];
  }
}

/// Sums over a part relative to its largest logit m: of e^x and x e^x with x = (logit - m) scale. -inf adds
/// nothing; a NaN makes the sums NaN. As it lies in the workspace.
struct PartSums {
  double maximum, sum, moment;
};
static_assert(sizeof(PartSums) == kPartDoubles * sizeof(double));

constexpr std::size_t kPartSharedBytes = kLogitsWarps * (sizeof(float) + 2 * sizeof(double));

/// Writes the sums of the part whose shares the block's threads hold. A thread adds its few numbers in float,
/// all else is added in double.
__device__ inline void sum_part(const float (&values)[kThreadLogits], float scale, PartSums* out) {
  double* sums = block_shared<double>();                              // [warps][2]
  float* maxima = reinterpret_cast<float*>(sums + 2 * kLogitsWarps);  // [warps]
  float maximum = values[0];
#pragma unroll
  for (int i = 1; i < kThreadLogits; ++i) maximum = fmaxf(maximum, values[i]);
  maximum = warp_max(maximum);
  if (lane_id() == 0) maxima[warp_id()] = maximum;
  __syncthreads();
  maximum = maxima[0];
#pragma unroll
  for (int warp = 1; warp < kLogitsWarps; ++warp) maximum = fmaxf(maximum, maxima[warp]);
  const float shift = maximum == -INFINITY ? 0 : maximum;  // -inf - shift is -inf, and e^-inf is 0
  float sum = 0, moment = 0;
#pragma unroll
  for (int i = 0; i < kThreadLogits; ++i) {
    const float x = (values[i] - shift) * scale, e = expf(x);
    sum += e;
    moment += e > 0 ? e * x : 0;  // not 0 times -inf
  }
  const double warp_sums = warp_sum(static_cast<double>(sum)),
               moments = warp_sum(static_cast<double>(moment));
  if (lane_id() == 0) {
    sums[2 * warp_id()] = warp_sums;
    sums[2 * warp_id() + 1] = moments;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  PartSums total = {static_cast<double>(maximum), 0, 0};
  for (int warp = 0; warp < kLogitsWarps; ++warp) {
    total.sum += sums[2 * warp];
    total.moment += sums[2 * warp + 1];
  }
  *out = total;
}

__device__ inline PartSums* parts_of_row(double* workspace, std::int64_t row, std::int64_t parts) {
  return reinterpret_cast<PartSums*>(workspace) + row * parts;
}

template <class T>
__global__ void logits_parts_kernel(LogitsArgs<T> args, std::int64_t parts) {
  const std::int64_t row = blockIdx.x, part = blockIdx.y;
  float* logits = args.logits + matrix_offset(row, part * kLogitsPart, args.V);
  const PartShare share = interleaved_share(part_tokens(args.V, part));
  const float cap = static_cast<float>(args.softcap);
  float values[kThreadLogits];
  load_share(values, logits, share);
  if (cap > 0) {
#pragma unroll
    for (int i = 0; i < kThreadLogits; ++i)  // what lies beyond the row stays -inf
      if (share.first + i / kVector<float> * share.step + i % kVector<float> < share.count)
        values[i] = cap * tanhf(values[i] / cap);
    store_share(logits, values, share);
  }
  sum_part(values, static_cast<float>(args.inv_temperature), parts_of_row(args.workspace, row, parts) + part);
}

/// The shared memory of merge_parts: masses of a row's parts relative to the row's largest logit, their
/// moments and largest logits.
struct MergedParts {
  double *masses, *moments, *maxima;
};
__device__ inline MergedParts merged_parts(double* shared, std::int64_t parts) {
  return {shared, shared + parts, shared + 2 * parts};
}

/// Merges the parts of a row, in order. One barrier; every thread gets the result.
__device__ inline PartSums merge_parts(const PartSums* from, std::int64_t parts, float scale,
                                       MergedParts shared) {
  float maximum = -INFINITY;
  for (std::int64_t p = lane_id(); p < parts; p += kWarp)
    maximum = fmaxf(maximum, static_cast<float>(from[p].maximum));
  PartSums row = {static_cast<double>(warp_max(maximum)), 0, 0};
  for (std::int64_t p = threadIdx.x; p < parts; p += blockDim.x) {
    const PartSums part = from[p];
    const bool empty = part.sum == 0;  // nothing but -inf
    const double x = (part.maximum - row.maximum) * static_cast<double>(scale), factor = exp(x);
    shared.masses[p] = empty ? 0 : factor * part.sum;
    shared.moments[p] = empty || factor == 0 ? 0 : factor * (part.moment + x * part.sum);
    shared.maxima[p] = part.maximum;
  }
  __syncthreads();
  for (std::int64_t p = 0; p < parts; ++p) {
    row.sum += shared.masses[p];
    row.moment += shared.moments[p];
  }
  return row;
}

/// Statistics of a row from its sums and the logit of its token.
__device__ inline LogitsRow row_statistics(const PartSums& row, float scale, float logit) {
  const double log_sum = log(row.sum);
  LogitsRow out;
  out.max = row.maximum * static_cast<double>(scale);
  out.lse = out.max + log_sum;
  out.logprob = (static_cast<double>(logit) - row.maximum) * static_cast<double>(scale) - log_sum;
  out.entropy = log_sum - row.moment / row.sum;
  return out;
}

template <class T>
__global__ void logits_rows_kernel(LogitsArgs<T> args, std::int64_t parts) {
  const std::int64_t row = blockIdx.x;
  const float scale = static_cast<float>(args.inv_temperature);
  const PartSums sums = merge_parts(parts_of_row(args.workspace, row, parts), parts, scale,
                                    merged_parts(block_shared<double>(), parts));
  if (threadIdx.x == 0)
    args.statistics[row] =
        row_statistics(sums, scale, args.logits[matrix_offset(row, args.targets[row], args.V)]);
}

/// Out: float over the logits themselves, or T.
template <class T, class Out>
__global__ void logits_grad_kernel(LogitsArgs<T> args, Out* out) {
  const std::int64_t row = blockIdx.x, part = blockIdx.y, at = matrix_offset(row, part * kLogitsPart, args.V);
  const std::int64_t target = args.targets[row] - part * kLogitsPart;
  const float cap = static_cast<float>(args.softcap), scale = static_cast<float>(args.inv_temperature);
  const float lse = static_cast<float>(args.statistics[row].lse);
  const float entropy = static_cast<float>(args.statistics[row].entropy);
  const float dlogprob = args.dlogprobs[row], dentropy = args.dentropies ? args.dentropies[row] : 0;
  const bool wide = is_wide(args.logits + at), wide_out = is_wide(out + at);
  for_groups(part_tokens(args.V, part), threadIdx.x, kLogitsThreads,
             [&](std::int64_t first, std::int64_t count) {
               Group group = load_group(args.logits + at + first, count, wide);
#pragma unroll
               for (int j = 0; j < kGroup; ++j) {
                 const float log_p = group.at[j] * scale - lse;
                 float gradient = -expf(log_p) * (dlogprob + dentropy * (log_p + entropy));
                 if (first + j == target) gradient += dlogprob;
                 gradient *= scale;
                 if (cap > 0) gradient *= 1 - (group.at[j] / cap) * (group.at[j] / cap);
                 group.at[j] = gradient;
               }
               store_group(out + at + first, group, count, wide_out);
             });
}

/// The temperature is of no effect on a greedy row's token; its statistics are at temperature 1.
__device__ inline float draw_scale(const DrawKey& key) {
  return key.greedy ? 1 : static_cast<float>(key.inv_temperature);
}

template <class T>
__global__ void draw_parts_kernel(DrawArgs<T> args, std::int64_t parts) {
  const std::int64_t row = blockIdx.x, part = blockIdx.y;
  float values[kThreadLogits];
  load_share(values, args.logits + matrix_offset(row, part * kLogitsPart, args.V),
             interleaved_share(part_tokens(args.V, part)));
  sum_part(values, draw_scale(args.keys[row]), parts_of_row(args.workspace, row, parts) + part);
}

/// The first of `count` masses at which `below` plus the masses up to it exceed `target`; the last one that
/// is not zero when rounding leaves the target above them all. `below` becomes what lies before it.
template <class Mass>
__device__ inline std::int64_t choose(std::int64_t count, double target, double& below, const Mass& mass) {
  std::int64_t chosen = 0;
  double up_to = below;
  bool found = false;
#pragma unroll
  for (std::int64_t i = 0; i < count; ++i) {
    const double m = mass(i);
    if (found || m <= 0) continue;
    chosen = i;
    below = up_to;
    up_to += m;
    found = up_to > target;
  }
  return chosen;
}

// The part of the row, then the warp whose tokens they are, the thread, the token. A greedy row is one whose
// largest logits have mass 1 and the others none, at the number 0.
template <class T>
__global__ void draw_rows_kernel(DrawArgs<T> args, std::int64_t parts) {
  double* thread_masses = block_shared<double>();        // [threads]
  double* warp_masses = thread_masses + kLogitsThreads;  // [warps]
  const MergedParts shared = merged_parts(warp_masses + kLogitsWarps, parts);
  const std::int64_t row = blockIdx.x;
  const DrawKey key = args.keys[row];
  const float scale = draw_scale(key);
  const PartSums sums = merge_parts(parts_of_row(args.workspace, row, parts), parts, scale, shared);
  // Neither a NaN nor an infinite maximum.
  if (!(sums.maximum - sums.maximum == 0) || sums.sum != sums.sum) {
    if (threadIdx.x != 0) return;
    args.tokens[row] = -1;
    if (args.statistics) args.statistics[row] = {NAN, NAN, NAN, NAN};
    return;
  }
  const float largest = static_cast<float>(sums.maximum);
  double target = key.greedy ? 0 : to_unit_interval(random_bits_at(key.seed, key.a, key.b, key.c)) * sums.sum;
  double below = 0;
  const std::int64_t part = choose(parts, target, below, [&](std::int64_t p) {
    return key.greedy ? static_cast<double>(shared.maxima[p] == sums.maximum) : shared.masses[p];
  });
  const float part_largest = static_cast<float>(shared.maxima[part]);
  target = (target - below) / exp((shared.maxima[part] - sums.maximum) * static_cast<double>(scale));

  const float* logits = args.logits + matrix_offset(row, 0, args.V);
  float masses[kThreadLogits];
  load_share(masses, logits + part * kLogitsPart, consecutive_share(part_tokens(args.V, part)));
  double mass = 0;
#pragma unroll
  for (int i = 0; i < kThreadLogits; ++i) {
    masses[i] =
        key.greedy ? static_cast<float>(masses[i] == largest) : expf((masses[i] - part_largest) * scale);
    mass += static_cast<double>(masses[i]);
  }
  thread_masses[threadIdx.x] = mass;
  mass = warp_sum(mass);
  if (lane_id() == 0) warp_masses[warp_id()] = mass;
  __syncthreads();
  below = 0;
  const std::int64_t warp =
      choose(kLogitsWarps, target, below, [&](std::int64_t i) { return warp_masses[i]; });
  const std::int64_t thread = warp * kWarp + choose(kWarp, target, below, [&](std::int64_t i) {
                                return thread_masses[warp * kWarp + i];
                              });
  if (threadIdx.x != thread) return;
  const std::int64_t token =
      part * kLogitsPart + thread * kThreadLogits +
      choose(kThreadLogits, target, below, [&](std::int64_t i) { return static_cast<double>(masses[i]); });
  args.tokens[row] = static_cast<TokenId>(token);
  if (args.statistics) args.statistics[row] = row_statistics(sums, scale, logits[token]);
}

inline dim3 blocks_for_parts(std::int64_t rows, std::int64_t V) {
  return dim3(static_cast<unsigned>(rows), static_cast<unsigned>(logits_parts(V)));
}

template <class T>
void logits(const LogitsArgs<T>& args, std::int64_t rows, void* queue) {
  const std::int64_t parts = logits_parts(args.V);
  launch("logits_parts", logits_parts_kernel<T>, blocks_for_parts(rows, args.V), kLogitsThreads,
         kPartSharedBytes, queue, args, parts);
  launch("logits_rows", logits_rows_kernel<T>, dim3(static_cast<unsigned>(rows)), kWarp,
         static_cast<std::size_t>(3 * parts) * sizeof(double), queue, args, parts);
}
template <class T>
void logits_grad(const LogitsArgs<T>& args, std::int64_t rows, void* queue) {
  const dim3 grid = blocks_for_parts(rows, args.V);
  if (args.rounded)
    launch("logits_grad", logits_grad_kernel<T, T>, grid, kLogitsThreads, 0, queue, args, args.rounded);
  else
    launch("logits_grad", logits_grad_kernel<T, float>, grid, kLogitsThreads, 0, queue, args, args.logits);
}
template <class T>
void draw(const DrawArgs<T>& args, std::int64_t rows, void* queue) {
  const std::int64_t parts = logits_parts(args.V), doubles = kLogitsThreads + kLogitsWarps + 3 * parts;
  launch("draw_parts", draw_parts_kernel<T>, blocks_for_parts(rows, args.V), kLogitsThreads, kPartSharedBytes,
         queue, args, parts);
  launch("draw_rows", draw_rows_kernel<T>, dim3(static_cast<unsigned>(rows)), kLogitsThreads,
         static_cast<std::size_t>(doubles) * sizeof(double), queue, args, parts);
}

}  // namespace rlhf::kernels::RLHF_GPU

#pragma once
// From qkv to cache: q/k norm, rotary embedding and K/V into their blocks, and the way back. One warp per
// (row, head); each lane holds both halves of up to kPairs rotated pairs in registers, so a head is read and
// written once. Heads of up to 256 elements. Bound: memory; K is written 16 elements apart, which costs a
// line per element but is small beside what attention reads.

#include "rlhf/kernels/cuda/reduce.cuh"
#include "rlhf/kernels/device_kernels.h"

namespace rlhf::kernels::RLHF_GPU {

constexpr int kPairs = 4;  // 32 lanes x 4 pairs = 256 elements
constexpr int kHeadThreads = 128;

/// A head's elements i and i + H/2 for i = lane, lane + 32, ...
struct HeadPairs {
  float lo[kPairs], hi[kPairs];
};

template <class Fn>
__device__ inline void for_pairs(std::int64_t half, const Fn& fn) {
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const std::int64_t i = lane_id() + kWarp * p;
    if (i < half) fn(p, i);
  }
}

template <class T>
__device__ inline HeadPairs load_head(const T* x, std::int64_t half) {
  HeadPairs head = {};
  for_pairs(half, [&](int p, std::int64_t i) {
    head.lo[p] = to_float(x[i]);
    head.hi[p] = to_float(x[i + half]);
  });
  return head;
}

template <class T>
__device__ inline void store_head(T* x, std::int64_t half, const HeadPairs& head) {
  for_pairs(half, [&](int p, std::int64_t i) {
    x[i] = from_float<T>(head.lo[p]);
    x[i + half] = from_float<T>(head.hi[p]);
  });
}

__device__ inline float head_rstd(const HeadPairs& head, std::int64_t half, double eps) {
  float square = 0;
  for_pairs(half, [&](int p, std::int64_t) { square += head.lo[p] * head.lo[p] + head.hi[p] * head.hi[p]; });
  return 1 / sqrtf(warp_sum(square) / static_cast<float>(2 * half) + static_cast<float>(eps));
}

/// Rotates by the angle of `position`; sign -1 rotates back.
template <class W>
__device__ inline void rotate(HeadPairs& head, std::int64_t half, const W* cos, const W* sin,
                              std::int64_t position, float sign) {
  for_pairs(half, [&](int p, std::int64_t i) {
    const float c = cos[matrix_offset(position, i, half)], s = sign * sin[matrix_offset(position, i, half)];
    const float a = head.lo[p], b = head.hi[p];
    head.lo[p] = a * c - b * s;
    head.hi[p] = b * c + a * s;
  });
}

/// Calls fn(block) for every block that takes row t's K and V.
template <class Fn>
__device__ inline void for_blocks_of_row(const PassRows& rows, std::int64_t t, const Fn& fn) {
  fn(rows.tables[t][rows.positions[t] / kBlockTokens]);
  if (!rows.copy_offsets) return;
  for (std::size_t i = rows.copy_offsets[t]; i < rows.copy_offsets[t + 1]; ++i) fn(rows.copies[i]);
}

/// Head number `task` of the pass: of q, k or v.
struct HeadTask {
  std::int64_t t, n, g;  ///< row, head in qkv, kv head (of k and v)
  bool is_q, is_v;
};
__device__ inline HeadTask head_task(std::int64_t task, std::int64_t N, std::int64_t G) {
  const auto heads = static_cast<std::uint32_t>(N + 2 * G), number = static_cast<std::uint32_t>(task);
  const std::int64_t n = number % heads;  // divisions of 64 bits cost more than the rest of a head's work
  return {number / heads, n, n < N ? 0 : n < N + G ? n - N : n - N - G, n < N, n >= N + G};
}
__device__ inline std::int64_t task_of_warp() {
  return static_cast<std::int64_t>(blockIdx.x) * num_warps() + warp_id();
}

/// Bits of the largest magnitude of a head: NaN is beyond infinity.
__device__ inline std::uint32_t head_largest(const HeadPairs& head, std::int64_t half) {
  std::uint32_t largest = 0;
  const auto take = [&](std::uint32_t magnitude) { largest = magnitude > largest ? magnitude : largest; };
  for_pairs(half, [&](int p, std::int64_t) {
    take(__builtin_bit_cast(std::uint32_t, head.lo[p]) & 0x7FFFFFFFU);
    take(__builtin_bit_cast(std::uint32_t, head.hi[p]) & 0x7FFFFFFFU);
  });
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    take(__shfl_xor_sync(kAllLanes, largest, distance));
  return largest;
}

template <class T, class E>
__global__ void append_kernel(AppendArgs<T, E> args, PassRows rows) {
  follow_last_kernel();
  const std::int64_t half = args.H / 2, width = (args.N + 2 * args.G) * args.H;
  if (task_of_warp() >= rows.count * (args.N + 2 * args.G)) return;
  const HeadTask task = head_task(task_of_warp(), args.N, args.G);
  T* x = args.qkv + matrix_offset(task.t, task.n * args.H, width);
  HeadPairs head = load_head(x, half);
  const T* weight = task.is_v ? nullptr : task.is_q ? args.q_norm : args.k_norm;
  if (weight) {
    const float rstd = head_rstd(head, half, args.eps), offset = args.plus_one ? 1 : 0;
    for_pairs(half, [&](int p, std::int64_t i) {
      head.lo[p] *= rstd * (offset + to_float(weight[i]));
      head.hi[p] *= rstd * (offset + to_float(weight[i + half]));
    });
  }
  const std::int64_t position = rows.positions[task.t], slot = position % kBlockTokens;
  if (args.cos && !task.is_v) rotate(head, half, args.cos, args.sin, position, 1);
  if (!task.is_v) store_head(x, half, head);
  if (task.is_q) {
    if (args.q) store_head(args.q + matrix_offset(task.t, task.n * args.H, args.N * args.H), half, head);
    return;
  }
  Float8Scale scale = {};
  float factor = 1;
  if constexpr (kScaleRows < E >> 0) {
    scale = float8_scale(head_largest(head, half));
    factor = inverse_scale(scale);
  }
  E* cache = task.is_v ? args.v : args.k;
  for_blocks_of_row(rows, task.t, [&](std::int32_t block) {
    E* to = cache + head_offset<E>(block, args.block_stride, task.g, args.H);
    for_pairs(half, [&](int p, std::int64_t i) {
      const std::int64_t j = i + half;
      to[task.is_v ? value_offset(slot, i, args.H) : key_offset(slot, i)] =
          from_float<E>(head.lo[p] * factor);
      to[task.is_v ? value_offset(slot, j, args.H) : key_offset(slot, j)] =
          from_float<E>(head.hi[p] * factor);
    });
    if constexpr (kScaleRows < E >> 0)
      if (lane_id() == 0) to[scale_offset(slot, args.H)] = E{scale.bits};
  });
}

// dK and dV from their blocks into dqkv; q and k rotated back. What is left is the gradient of the normed
// heads.
template <class T>
__global__ void collect_grad_kernel(AppendGradArgs<T> args, PassRows rows) {
  const std::int64_t half = args.H / 2, width = (args.N + 2 * args.G) * args.H;
  if (task_of_warp() >= rows.count * (args.N + 2 * args.G)) return;
  const HeadTask task = head_task(task_of_warp(), args.N, args.G);
  T* d = args.dqkv + matrix_offset(task.t, task.n * args.H, width);
  const std::int64_t position = rows.positions[task.t], slot = position % kBlockTokens;
  HeadPairs head = {};
  if (task.is_q) {
    head = load_head(d, half);
  } else {
    const Wide<T>* cache = task.is_v ? args.dv : args.dk;
    for_blocks_of_row(rows, task.t, [&](std::int32_t block) {
      const Wide<T>* from = cache + head_offset(block, args.block_stride, task.g, args.H);
      for_pairs(half, [&](int p, std::int64_t i) {
        const std::int64_t j = i + half;
        head.lo[p] += from[task.is_v ? value_offset(slot, i, args.H) : key_offset(slot, i)];
        head.hi[p] += from[task.is_v ? value_offset(slot, j, args.H) : key_offset(slot, j)];
      });
    });
  }
  if (args.cos && !task.is_v) rotate(head, half, args.cos, args.sin, position, -1);
  store_head(d, half, head);
}

// Weight gradient of one of the two norms over heads [first, first + heads) of every row: a warp per (row,
// head) in turn, a sum of every block. How they are spread depends on their number only.
template <class T>
__global__ void head_norm_parts_kernel(AppendGradArgs<T> args, std::int64_t rows, std::int64_t first,
                                       std::int64_t heads) {
  float* scratch = block_shared<float>();  // [warps][H]
  const std::int64_t half = args.H / 2, width = (args.N + 2 * args.G) * args.H;
  HeadPairs sum = {};
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * num_warps() + warp_id();
  for (std::int64_t i = begin; i < rows * heads; i += kHeadNormParts * num_warps()) {
    const std::int64_t at = matrix_offset(i / heads, (first + i % heads) * args.H, width);
    const HeadPairs x = load_head(args.raw + at, half), d = load_head(args.dqkv + at, half);
    const float rstd = head_rstd(x, half, args.eps);
    for_pairs(half, [&](int p, std::int64_t) {
      sum.lo[p] += d.lo[p] * x.lo[p] * rstd;
      sum.hi[p] += d.hi[p] * x.hi[p] * rstd;
    });
  }
  store_head(scratch + warp_id() * args.H, half, sum);
  __syncthreads();
  for (std::int64_t h = threadIdx.x; h < args.H; h += blockDim.x) {
    float total = 0;
    for (int warp = 0; warp < num_warps(); ++warp) total += scratch[warp * args.H + h];
    args.workspace[matrix_offset(blockIdx.x, h, args.H)] = total;
  }
}

template <class T>
__global__ void head_norm_weight_kernel(AppendGradArgs<T> args, Wide<T>* dweight) {
  for (std::int64_t h = threadIdx.x; h < args.H; h += blockDim.x) {
    float total = 0;
#pragma unroll 8
    for (std::int64_t part = 0; part < kHeadNormParts; ++part)
      total += args.workspace[matrix_offset(part, h, args.H)];
    dweight[h] += total;
  }
}

// Through the norms, in place.
template <class T>
__global__ void head_norm_grad_kernel(AppendGradArgs<T> args, std::int64_t rows) {
  const std::int64_t half = args.H / 2, width = (args.N + 2 * args.G) * args.H, heads = args.N + args.G;
  if (task_of_warp() >= rows * heads) return;
  const auto task = static_cast<std::uint32_t>(task_of_warp()), row_heads = static_cast<std::uint32_t>(heads);
  const std::int64_t t = task / row_heads, n = task % row_heads, at = matrix_offset(t, n * args.H, width);
  const T* weight = n < args.N ? args.q_norm : args.k_norm;
  if (!weight) return;
  const HeadPairs x = load_head(args.raw + at, half);
  HeadPairs d = load_head(args.dqkv + at, half);
  const float rstd = head_rstd(x, half, args.eps), offset = args.plus_one ? 1 : 0;
  float dot = 0;
  for_pairs(half, [&](int p, std::int64_t i) {
    d.lo[p] *= offset + to_float(weight[i]);
    d.hi[p] *= offset + to_float(weight[i + half]);
    dot += (d.lo[p] * x.lo[p] + d.hi[p] * x.hi[p]) * rstd;
  });
  dot = warp_sum(dot) / static_cast<float>(args.H);
  for_pairs(half, [&](int p, std::int64_t) {
    d.lo[p] = rstd * (d.lo[p] - x.lo[p] * rstd * dot);
    d.hi[p] = rstd * (d.hi[p] - x.hi[p] * rstd * dot);
  });
  store_head(args.dqkv + at, half, d);
}

inline void check_head_width(std::int64_t H) {
  RLHF_CHECK(H > 0 && H % 2 == 0 && H <= 2 * kWarp * kPairs, "CUDA: heads are ", H,
             " wide, expected an even number up to ", 2 * kWarp * kPairs);
}

inline dim3 blocks_for_heads(std::int64_t tasks) {
  RLHF_CHECK(tasks < std::int64_t{1} << 32, "CUDA: ", tasks, " heads in one pass, expected less than 2^32");
  return dim3(static_cast<unsigned>(ceil_div(tasks, kHeadThreads / kWarp)));
}

template <class T, class E>
void append(const AppendArgs<T, E>& args, const PassRows& rows, void* queue) {
  check_head_width(args.H);
  launch_early("append", append_kernel<T, E>, blocks_for_heads(rows.count * (args.N + 2 * args.G)),
               kHeadThreads, 0, queue, args, rows);
}

template <class T>
void append_grad(const AppendGradArgs<T>& args, const PassRows& rows, void* queue) {
  check_head_width(args.H);
  launch("collect_grad", collect_grad_kernel<T>, blocks_for_heads(rows.count * (args.N + 2 * args.G)),
         kHeadThreads, 0, queue, args, rows);
  const auto weight_gradient = [&](std::int64_t first, std::int64_t heads, Wide<T>* dweight) {
    if (!dweight || rows.count == 0) return;
    RLHF_CHECK(args.workspace, "CUDA: gradients of norms of heads need a workspace");
    launch("head_norm_parts", head_norm_parts_kernel<T>, dim3(static_cast<unsigned>(kHeadNormParts)), 512,
           static_cast<std::size_t>(512 / kWarp * args.H) * sizeof(float), queue, args, rows.count, first,
           heads);
    launch("head_norm_weight", head_norm_weight_kernel<T>, dim3(1), 256, 0, queue, args, dweight);
  };
  weight_gradient(0, args.N, args.dq_norm);
  weight_gradient(args.N, args.G, args.dk_norm);
  if (args.q_norm || args.k_norm)
    launch("head_norm_grad", head_norm_grad_kernel<T>, blocks_for_heads(rows.count * (args.N + args.G)),
           kHeadThreads, 0, queue, args, rows.count);
}

}  // namespace rlhf::kernels::RLHF_GPU

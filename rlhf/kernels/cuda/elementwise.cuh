#pragma once
// Activations, vector operations, embedding rows and block copies. A thread works on 8 neighbouring elements,
// neighbouring threads on neighbouring ones. Bound: memory.

#include "rlhf/kernels/cuda/wide.cuh"
#include "rlhf/kernels/device_kernels.h"

namespace rlhf::kernels::RLHF_GPU {

constexpr int kThreads = 256;

inline dim3 blocks_for(std::int64_t n) {
  const std::int64_t blocks = ceil_div(n, kThreads);
  return dim3(
      static_cast<unsigned>(blocks < 65536 ? blocks : 65536));  // each thread then takes several elements
}

/// Calls fn(i) for this thread's share of [0, n).
template <class Fn>
__device__ inline void for_elements(std::int64_t n, const Fn& fn) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step)
    fn(i);
}

/// Calls fn(first, count) for this thread's share of the groups of [0, n).
template <class Fn>
__device__ inline void for_grid_groups(std::int64_t n, const Fn& fn) {
  for_groups(n, static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x,
             static_cast<std::int64_t>(gridDim.x) * blockDim.x, fn);
}
inline dim3 blocks_for_groups(std::int64_t n) {
  return blocks_for(ceil_div(n, kGroup));
}

/// Row blockIdx.x; the blocks blockIdx.y share its groups.
template <class Fn>
__device__ inline void for_row_groups(std::int64_t n, const Fn& fn) {
  for_groups(n, static_cast<std::int64_t>(blockIdx.y) * blockDim.x + threadIdx.x,
             static_cast<std::int64_t>(gridDim.y) * blockDim.x, fn);
}
inline dim3 blocks_for_rows(std::int64_t rows, std::int64_t n) {
  return dim3(static_cast<unsigned>(rows), static_cast<unsigned>(ceil_div(n, kThreads * kGroup)));
}

struct ValueSlope {
  float value, slope;
};

__device__ inline ValueSlope silu(float x) {
  const float s = quick_quotient(1, 1 + expf(-x));
  return {x * s, s * (1 + x * (1 - s))};
}
__device__ inline ValueSlope gelu(float x) {
  constexpr float kC = 0.7978845608028654F, kA = 0.044715F;  // sqrt(2 / pi), Hendrycks & Gimpel 2016
  const float t = tanhf(kC * (x + kA * x * x * x));
  return {0.5F * x * (1 + t), 0.5F * (1 + t) + 0.5F * x * (1 - t * t) * kC * (1 + 3 * kA * x * x)};
}

struct GroupSlopes {
  Group value, slope;
};
__device__ inline GroupSlopes activate(const Group& x, GluKind kind) {
  GroupSlopes out;
  const auto put = [&](int j, ValueSlope at) {
    out.value.at[j] = at.value;
    out.slope.at[j] = at.slope;
  };
  if (kind == GluKind::kSilu) {
#pragma unroll
    for (int j = 0; j < kGroup; ++j) put(j, silu(x.at[j]));
  } else {
#pragma unroll
    for (int j = 0; j < kGroup; ++j) put(j, gelu(x.at[j]));
  }
  return out;
}

__device__ inline Group operator*(const Group& a, const Group& b) {
  Group out;
#pragma unroll
  for (int j = 0; j < kGroup; ++j) out.at[j] = a.at[j] * b.at[j];
  return out;
}

template <class T>
__global__ void activation_kernel(ActivationArgs<T> args) {
  follow_last_kernel();
  const bool gated = args.kind != GluKind::kGeluTanhPlain;
  const std::int64_t t = blockIdx.x;
  const T* gate = args.x + matrix_offset(t, 0, gated ? 2 * args.F : args.F);
  const T* up = gate + args.F;  // where gated
  T* y = args.y + matrix_offset(t, 0, args.F);
  const bool wide = is_wide(gate, y) && (!gated || is_wide(up));
  for_row_groups(args.F, [&](std::int64_t f, std::int64_t count) {
    const Group x = load_group(gate + f, count, wide);
    if (gated) {
      const Group factor = load_group(up + f, count, wide);
      store_group(y + f, activate(x, args.kind).value * factor, count, wide);
    } else {
      store_group(y + f, activate(x, args.kind).value, count, wide);
    }
  });
}

template <class T>
__global__ void activation_grad_kernel(ActivationGradArgs<T> args) {
  const bool gated = args.kind != GluKind::kGeluTanhPlain;
  const std::int64_t t = blockIdx.x, row = matrix_offset(t, 0, gated ? 2 * args.F : args.F);
  const T* gate = args.x + row;
  T* dgate = args.dx + row;
  const T* dy = args.dy + matrix_offset(t, 0, args.F);
  const bool wide = is_wide(gate, dgate, dy) && (!gated || is_wide(gate + args.F, dgate + args.F));
  for_row_groups(args.F, [&](std::int64_t f, std::int64_t count) {
    const Group x = load_group(gate + f, count, wide), upstream = load_group(dy + f, count, wide);
    if (gated) {
      const Group factor = load_group(gate + args.F + f, count, wide);
      const GroupSlopes at = activate(x, args.kind);
      store_group(dgate + f, upstream * factor * at.slope, count, wide);
      store_group(dgate + args.F + f, upstream * at.value, count, wide);
    } else {
      store_group(dgate + f, upstream * activate(x, args.kind).slope, count, wide);
    }
  });
}

template <class T>
__global__ void add_kernel(T* y, const T* x, std::int64_t n) {
  const bool wide = is_wide(y, x);
  for_grid_groups(n, [&](std::int64_t i, std::int64_t count) {
    Group sum = load_group(y + i, count, wide);
    const Group other = load_group(x + i, count, wide);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) sum.at[j] += other.at[j];
    store_group(y + i, sum, count, wide);
  });
}

template <class T>
__global__ void scale_kernel(T* y, float factor, std::int64_t n) {
  const bool wide = is_wide(y);
  for_grid_groups(n, [&](std::int64_t i, std::int64_t count) {
    Group product = load_group(y + i, count, wide);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) product.at[j] *= factor;
    store_group(y + i, product, count, wide);
  });
}

template <class T>
__global__ void narrow_kernel(T* to, const float* from, std::int64_t n) {
  const bool wide = is_wide(to, from);
  for_grid_groups(n, [&](std::int64_t i, std::int64_t count) {
    store_group(to + i, load_group(from + i, count, wide), count, wide);
  });
}

template <class T>
__global__ void embed_kernel(EmbedArgs<T> args, PassRows rows) {
  const std::int64_t t = blockIdx.x;
  const T* row = args.table + matrix_offset(rows.tokens[t], 0, args.D);
  const T* position = args.positions ? args.positions + matrix_offset(rows.positions[t], 0, args.D) : nullptr;
  T* x = args.x + matrix_offset(t, 0, args.D);
  const bool wide = is_wide(row, position, x);
  const float scale = static_cast<float>(args.scale);
  for_groups(args.D, threadIdx.x, blockDim.x, [&](std::int64_t d, std::int64_t count) {
    Group value = load_group(row + d, count, wide);
    const Group place = position ? load_group(position + d, count, wide) : Group{};
#pragma unroll
    for (int j = 0; j < kGroup; ++j) value.at[j] = value.at[j] * scale + place.at[j];
    store_group(x + d, value, count, wide);
  });
}

template <class T>
__global__ void embed_grad_kernel(EmbedGradArgs<T> args) {
  const std::int64_t s = blockIdx.x, key = args.keys[s];
  for (std::int64_t d = threadIdx.x; d < args.D; d += blockDim.x) {
    float sum = args.dtable[matrix_offset(key, d, args.D)];
    for (std::int64_t i = args.offsets[s]; i < args.offsets[s + 1]; ++i)
      sum += to_float(args.dx[matrix_offset(args.order[i], d, args.D)]) * static_cast<float>(args.scale);
    args.dtable[matrix_offset(key, d, args.D)] = sum;
  }
}

template <class T>
__global__ void gather_rows_kernel(T* to, const T* from, const std::int64_t* index, std::int64_t D) {
  const std::int64_t i = blockIdx.x;
  copy_elements(to + matrix_offset(i, 0, D), from + matrix_offset(index[i], 0, D), D);
}

template <class T>
__global__ void add_to_rows_kernel(T* to, const T* from, const std::int64_t* index, std::int64_t D) {
  const std::int64_t i = blockIdx.x;
  T* out = to + matrix_offset(index[i], 0, D);
  const T* row = from + matrix_offset(i, 0, D);
  const bool wide = is_wide(out, row);
  for_groups(D, threadIdx.x, blockDim.x, [&](std::int64_t d, std::int64_t count) {
    Group sum = load_group(out + d, count, wide);
    const Group other = load_group(row + d, count, wide);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) sum.at[j] += other.at[j];
    store_group(out + d, sum, count, wide);
  });
}

template <class T>
__global__ void copy_blocks_kernel(T* base, std::int64_t layer_stride, std::int64_t block_stride,
                                   const std::int32_t* pairs) {
  T* layer = base + static_cast<std::int64_t>(blockIdx.y) * layer_stride;
  copy_elements(layer + pairs[2 * blockIdx.x + 1] * block_stride,
                layer + pairs[2 * blockIdx.x] * block_stride, block_stride);
}

template <class T>
void activation(const ActivationArgs<T>& args, std::int64_t rows, void* queue) {
  launch_early("activation", activation_kernel<T>, blocks_for_rows(rows, args.F), kThreads, 0, queue, args);
}
template <class T>
void activation_grad(const ActivationGradArgs<T>& args, std::int64_t rows, void* queue) {
  launch("activation_grad", activation_grad_kernel<T>, blocks_for_rows(rows, args.F), kThreads, 0, queue,
         args);
}
template <class T>
void add(T* y, const T* x, std::int64_t n, void* queue) {
  launch("add", add_kernel<T>, blocks_for_groups(n), kThreads, 0, queue, y, x, n);
}
template <class T>
void scale(T* y, double factor, std::int64_t n, void* queue) {
  launch("scale", scale_kernel<T>, blocks_for_groups(n), kThreads, 0, queue, y, static_cast<float>(factor),
         n);
}
template <class T>
void narrow(T* to, const Wide<T>* from, std::int64_t n, void* queue) {
  launch("narrow", narrow_kernel<T>, blocks_for_groups(n), kThreads, 0, queue, to, from, n);
}
template <class T>
void embed(const EmbedArgs<T>& args, const PassRows& rows, void* queue) {
  launch("embed", embed_kernel<T>, dim3(static_cast<unsigned>(rows.count)), kThreads, 0, queue, args, rows);
}
template <class T>
void embed_grad(const EmbedGradArgs<T>& args, void* queue) {
  launch("embed_grad", embed_grad_kernel<T>, dim3(static_cast<unsigned>(args.num_keys)), kThreads, 0, queue,
         args);
}
template <class T>
void gather_rows(T* to, const T* from, const std::int64_t* index, std::int64_t rows, std::int64_t D,
                 void* queue) {
  launch("gather_rows", gather_rows_kernel<T>, dim3(static_cast<unsigned>(rows)), kThreads, 0, queue, to,
         from, index, D);
}
template <class T>
void add_to_rows(T* to, const T* from, const std::int64_t* index, std::int64_t rows, std::int64_t D,
                 void* queue) {
  launch("add_to_rows", add_to_rows_kernel<T>, dim3(static_cast<unsigned>(rows)), kThreads, 0, queue, to,
         from, index, D);
}
template <class T>
void copy_blocks(T* base, std::int64_t layers, std::int64_t layer_stride, std::int64_t block_stride,
                 const std::int32_t* pairs, std::int64_t num_pairs, void* queue) {
  launch("copy_blocks", copy_blocks_kernel<T>,
         dim3(static_cast<unsigned>(num_pairs), static_cast<unsigned>(layers)), kThreads, 0, queue, base,
         layer_stride, block_stride, pairs);
}

}  // namespace rlhf::kernels::RLHF_GPU

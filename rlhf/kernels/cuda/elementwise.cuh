#pragma once
// Activations, vector operations, embedding rows and block copies. One thread per element, neighbouring
// threads on neighbouring elements. Bound: memory.

#include "rlhf/kernels/cuda/reduce.cuh"
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

struct ValueSlope {
  float value, slope;
};

__device__ inline ValueSlope activate(float x, GluKind kind) {
  if (kind == GluKind::kSilu) {
    const float s = 1 / (1 + expf(-x));
    return {x * s, s * (1 + x * (1 - s))};
  }
  constexpr float kC = 0.7978845608028654F, kA = 0.044715F;  // sqrt(2 / pi), Hendrycks & Gimpel 2016
  const float t = tanhf(kC * (x + kA * x * x * x));
  return {0.5F * x * (1 + t), 0.5F * (1 + t) + 0.5F * x * (1 - t * t) * kC * (1 + 3 * kA * x * x)};
}

template <class T>
__global__ void activation_kernel(ActivationArgs<T> args, std::int64_t rows) {
  const bool gated = args.kind != GluKind::kGeluTanhPlain;
  for_elements(rows * args.F, [&](std::int64_t i) {
    const std::int64_t t = i / args.F, f = i % args.F;
    if (!gated) {
      args.y[i] = from_float<T>(activate(to_float(args.x[i]), args.kind).value);
      return;
    }
    const T* gate = args.x + matrix_offset(t, f, 2 * args.F);
    args.y[i] = from_float<T>(activate(to_float(gate[0]), args.kind).value * to_float(gate[args.F]));
  });
}

template <class T>
__global__ void activation_grad_kernel(ActivationGradArgs<T> args, std::int64_t rows) {
  const bool gated = args.kind != GluKind::kGeluTanhPlain;
  for_elements(rows * args.F, [&](std::int64_t i) {
    const std::int64_t t = i / args.F, f = i % args.F;
    const float dy = to_float(args.dy[i]);
    if (!gated) {
      args.dx[i] = from_float<T>(dy * activate(to_float(args.x[i]), args.kind).slope);
      return;
    }
    const std::int64_t at = matrix_offset(t, f, 2 * args.F);
    const ValueSlope gate = activate(to_float(args.x[at]), args.kind);
    args.dx[at] = from_float<T>(dy * to_float(args.x[at + args.F]) * gate.slope);
    args.dx[at + args.F] = from_float<T>(dy * gate.value);
  });
}

template <class T>
__global__ void add_kernel(T* y, const T* x, std::int64_t n) {
  for_elements(n, [&](std::int64_t i) { y[i] = from_float<T>(to_float(y[i]) + to_float(x[i])); });
}

template <class T>
__global__ void scale_kernel(T* y, float factor, std::int64_t n) {
  for_elements(n, [&](std::int64_t i) { y[i] = from_float<T>(to_float(y[i]) * factor); });
}

template <class T>
__global__ void narrow_kernel(T* to, const float* from, std::int64_t n) {
  for_elements(n, [&](std::int64_t i) { to[i] = from_float<T>(from[i]); });
}

template <class T>
__global__ void embed_kernel(EmbedArgs<T> args, PassRows rows) {
  const std::int64_t t = blockIdx.x;
  const T* row = args.table + matrix_offset(rows.tokens[t], 0, args.D);
  const T* position = args.positions ? args.positions + matrix_offset(rows.positions[t], 0, args.D) : nullptr;
  for (std::int64_t d = threadIdx.x; d < args.D; d += blockDim.x) {
    float value = to_float(row[d]) * static_cast<float>(args.scale);
    if (position) value += to_float(position[d]);
    args.x[matrix_offset(t, d, args.D)] = from_float<T>(value);
  }
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
  for (std::int64_t d = threadIdx.x; d < D; d += blockDim.x)
    to[matrix_offset(i, d, D)] = from[matrix_offset(index[i], d, D)];
}

template <class T>
__global__ void add_to_rows_kernel(T* to, const T* from, const std::int64_t* index, std::int64_t D) {
  const std::int64_t i = blockIdx.x;
  for (std::int64_t d = threadIdx.x; d < D; d += blockDim.x) {
    T& out = to[matrix_offset(index[i], d, D)];
    out = from_float<T>(to_float(out) + to_float(from[matrix_offset(i, d, D)]));
  }
}

template <class T>
__global__ void copy_blocks_kernel(T* base, std::int64_t layer_stride, std::int64_t block_stride,
                                   const std::int32_t* pairs) {
  T* layer = base + static_cast<std::int64_t>(blockIdx.y) * layer_stride;
  const T* from = layer + pairs[2 * blockIdx.x] * block_stride;
  T* to = layer + pairs[2 * blockIdx.x + 1] * block_stride;
  for (std::int64_t i = threadIdx.x; i < block_stride; i += blockDim.x) to[i] = from[i];
}

template <class T>
void activation(const ActivationArgs<T>& args, std::int64_t rows, void* queue) {
  launch("activation", activation_kernel<T>, blocks_for(rows * args.F), kThreads, 0, queue, args, rows);
}
template <class T>
void activation_grad(const ActivationGradArgs<T>& args, std::int64_t rows, void* queue) {
  launch("activation_grad", activation_grad_kernel<T>, blocks_for(rows * args.F), kThreads, 0, queue, args,
         rows);
}
template <class T>
void add(T* y, const T* x, std::int64_t n, void* queue) {
  launch("add", add_kernel<T>, blocks_for(n), kThreads, 0, queue, y, x, n);
}
template <class T>
void scale(T* y, double factor, std::int64_t n, void* queue) {
  launch("scale", scale_kernel<T>, blocks_for(n), kThreads, 0, queue, y, static_cast<float>(factor), n);
}
template <class T>
void narrow(T* to, const Wide<T>* from, std::int64_t n, void* queue) {
  launch("narrow", narrow_kernel<T>, blocks_for(n), kThreads, 0, queue, to, from, n);
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

#pragma once
// RMSNorm and LayerNorm, forward and backward, and column sums. One block per row; the row is read three
// times, twice of them from cache. Weight gradients: one block per 32 columns, a warp per row, so loads are
// whole lines. Bound: memory. The residual is added by the product before (accumulate), not here.

#include "rlhf/kernels/cuda/reduce.cuh"
#include "rlhf/kernels/kernel_table.h"

namespace rlhf::kernels::RLHF_GPU {

constexpr int kColumnThreads = 256;

inline int row_threads(std::int64_t D) {
  return D >= 1024 ? 256 : D >= 256 ? 128 : 32;
}

template <class T>
__global__ void norm_kernel(NormArgs<T> args) {
  float* scratch = block_shared<float>();
  const std::int64_t D = args.D, t = blockIdx.x;
  const T* x = args.x + matrix_offset(t, 0, D);
  T* y = args.y + matrix_offset(t, 0, D);
  float mean = 0;
  if (args.layer_norm) {
    for (std::int64_t d = threadIdx.x; d < D; d += blockDim.x) mean += to_float(x[d]);
    mean = block_sum(mean, scratch) / static_cast<float>(D);
  }
  float square = 0;
  for (std::int64_t d = threadIdx.x; d < D; d += blockDim.x) {
    const float centred = to_float(x[d]) - mean;
    square += centred * centred;
  }
  square = block_sum(square, scratch);
  const float rstd = 1 / sqrtf(square / static_cast<float>(D) + static_cast<float>(args.eps));
  const float offset = args.plus_one ? 1 : 0;
  for (std::int64_t d = threadIdx.x; d < D; d += blockDim.x) {
    float value = (to_float(x[d]) - mean) * rstd * (offset + to_float(args.weight[d]));
    if (args.bias) value += to_float(args.bias[d]);
    y[d] = from_float<T>(value);
  }
  if (threadIdx.x == 0) {
    if (args.rstd) args.rstd[t] = rstd;
    if (args.mean) args.mean[t] = mean;
  }
}

template <class T>
__global__ void norm_grad_input_kernel(NormGradArgs<T> args) {
  float* scratch = block_shared<float>();
  const std::int64_t D = args.D, t = blockIdx.x;
  const T* x = args.x + matrix_offset(t, 0, D);
  const T* dy = args.dy + matrix_offset(t, 0, D);
  T* dx = args.dx + matrix_offset(t, 0, D);
  const float mean = args.layer_norm ? args.mean[t] : 0, rstd = args.rstd[t];
  const float offset = args.plus_one ? 1 : 0;
  float dot = 0, sum = 0;
  for (std::int64_t d = threadIdx.x; d < D; d += blockDim.x) {
    const float slope = to_float(dy[d]) * (offset + to_float(args.weight[d]));
    dot += slope * (to_float(x[d]) - mean) * rstd;
    sum += slope;
  }
  dot = block_sum(dot, scratch) / static_cast<float>(D);
  sum = block_sum(sum, scratch) / static_cast<float>(D);
  if (!args.layer_norm) sum = 0;
  for (std::int64_t d = threadIdx.x; d < D; d += blockDim.x) {
    const float slope = to_float(dy[d]) * (offset + to_float(args.weight[d]));
    const float normalised = (to_float(x[d]) - mean) * rstd;
    dx[d] = from_float<T>(to_float(dx[d]) + rstd * (slope - sum - normalised * dot));
  }
}

/// Adds up value(row, column) over all rows, for the 32 columns of this block, and calls put(column, sum).
template <class Value, class Put>
__device__ inline void reduce_columns(std::int64_t rows, std::int64_t columns, const Value& value,
                                      const Put& put) {
  float* scratch = block_shared<float>();  // [warps][32]
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * kWarp + lane_id();
  float sum = 0;
  if (column < columns)
    for (std::int64_t row = warp_id(); row < rows; row += num_warps()) sum += value(row, column);
  scratch[threadIdx.x] = sum;
  __syncthreads();
  if (warp_id() == 0 && column < columns) {
    for (int warp = 1; warp < num_warps(); ++warp) sum += scratch[warp * kWarp + lane_id()];
    put(column, sum);
  }
}

template <class T>
__global__ void norm_grad_weight_kernel(NormGradArgs<T> args) {
  const auto normalised = [&](std::int64_t t, std::int64_t d) {
    const std::int64_t at = matrix_offset(t, d, args.D);
    return to_float(args.dy[at]) * (to_float(args.x[at]) - (args.layer_norm ? args.mean[t] : 0)) *
           args.rstd[t];
  };
  reduce_columns(args.T_rows, args.D, normalised, [&](std::int64_t d, float sum) { args.dweight[d] += sum; });
}

template <class T>
__global__ void column_sums_kernel(Wide<T>* out, const T* x, std::int64_t rows, std::int64_t n) {
  reduce_columns(
      rows, n,
      [&](std::int64_t row, std::int64_t column) { return to_float(x[matrix_offset(row, column, n)]); },
      [&](std::int64_t column, float sum) { out[column] += sum; });
}

template <class T>
void norm(const NormArgs<T>& args, std::int64_t rows, void* queue) {
  launch("norm", norm_kernel<T>, dim3(static_cast<unsigned>(rows)), row_threads(args.D),
         kWarp * sizeof(float), queue, args);
}

template <class T>
void add_column_sums(Wide<T>* out, const T* x, std::int64_t rows, std::int64_t n, void* queue) {
  launch("add_column_sums", column_sums_kernel<T>, dim3(static_cast<unsigned>(ceil_div(n, kWarp))),
         kColumnThreads, kColumnThreads * sizeof(float), queue, out, x, rows, n);
}

template <class T>
void norm_grad(const NormGradArgs<T>& args, void* queue) {
  launch("norm_grad_input", norm_grad_input_kernel<T>, dim3(static_cast<unsigned>(args.T_rows)),
         row_threads(args.D), kWarp * sizeof(float), queue, args);
  if (args.dweight)
    launch("norm_grad_weight", norm_grad_weight_kernel<T>,
           dim3(static_cast<unsigned>(ceil_div(args.D, kWarp))), kColumnThreads,
           kColumnThreads * sizeof(float), queue, args);
  if (args.dbias) add_column_sums<T>(args.dbias, args.dy, args.T_rows, args.D, queue);
}

}  // namespace rlhf::kernels::RLHF_GPU

#pragma once
// RMSNorm and LayerNorm, forward and backward, and column sums. One block per row, which its threads hold in
// registers in groups of 8 elements while they sum over it. Weight gradients: one block per 16 columns, over
// all rows, with 16 bytes per access. Bound: memory. The residual is added by the product before
// (accumulate), not here.

#include "rlhf/kernels/cuda/wide.cuh"
#include "rlhf/kernels/kernel_table.h"

namespace rlhf::kernels::RLHF_GPU {

/// How a row is spread over a block: a thread holds `held` groups.
struct RowShape {
  int threads, held;
};
inline RowShape row_shape(std::int64_t D) {
  const auto groups = static_cast<int>(D < 8192 ? ceil_div(D, kGroup) : 1024);
  if (groups <= 256) return {(groups + kWarp - 1) / kWarp * kWarp, 1};
  return {D <= 8192 ? 256 : 512, groups <= 512 ? 2 : 4};  // 1024 threads would not have the registers
}

/// Calls fn(i, d, count) for the groups i < kHeld of this thread, of which group i are the elements [d, d +
/// count) of the row, after load(i, d, count) of all of them unless they are `held` from the pass before. A
/// row of more than the block can hold goes through it piece by piece.
template <int kHeld, class Load, class Fn>
__device__ inline void for_row(std::int64_t D, bool held, const Load& load, const Fn& fn) {
  const std::int64_t piece = static_cast<std::int64_t>(blockDim.x) * kGroup * kHeld;
  const auto for_held = [&](std::int64_t first, const auto& call) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const std::int64_t d = first + (static_cast<std::int64_t>(i) * blockDim.x + threadIdx.x) * kGroup;
      if (d < D) call(i, d, D - d < kGroup ? D - d : static_cast<std::int64_t>(kGroup));
    }
  };
  for (std::int64_t first = 0; first < D; first += piece) {
    if (!held || piece < D) for_held(first, load);
    for_held(first, fn);
  }
}

template <class T, int kHeld>
__global__ void norm_kernel(NormArgs<T> args) {
  follow_last_kernel();
  float* scratch = block_shared<float>();
  const std::int64_t D = args.D, t = blockIdx.x;
  const T* x = args.x + matrix_offset(t, 0, D);
  T* y = args.y + matrix_offset(t, 0, D);
  const bool wide = is_wide(x, y, args.weight), wide_bias = is_wide(args.bias);
  Group row[kHeld];
  const auto load = [&](int i, std::int64_t d, std::int64_t count) {
    row[i] = load_group(x + d, count, wide);
  };
  float mean = 0;
  if (args.layer_norm) {
    for_row<kHeld>(D, false, load, [&](int i, std::int64_t, std::int64_t) {
#pragma unroll
      for (int j = 0; j < kGroup; ++j) mean += row[i].at[j];
    });
    mean = block_sum(mean, scratch) / static_cast<float>(D);
  }
  float square = 0;
  for_row<kHeld>(D, args.layer_norm, load, [&](int i, std::int64_t, std::int64_t count) {
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const float centred = j < count ? row[i].at[j] - mean : 0;
      square += centred * centred;
    }
  });
  square = block_sum(square, scratch);
  const float rstd = 1 / sqrtf(square / static_cast<float>(D) + static_cast<float>(args.eps));
  const float offset = args.plus_one ? 1 : 0;
  for_row<kHeld>(D, true, load, [&](int i, std::int64_t d, std::int64_t count) {
    const Group weight = load_group(args.weight + d, count, wide);
    const Group bias = args.bias ? load_group(args.bias + d, count, wide_bias) : Group{};
    Group out;
#pragma unroll
    for (int j = 0; j < kGroup; ++j)
      out.at[j] = (row[i].at[j] - mean) * rstd * (offset + weight.at[j]) + bias.at[j];
    store_group(y + d, out, count, wide);
  });
  if (threadIdx.x == 0) {
    if (args.rstd) args.rstd[t] = rstd;
    if (args.mean) args.mean[t] = mean;
  }
}

template <class T, int kHeld>
__global__ void norm_grad_input_kernel(NormGradArgs<T> args) {
  float* scratch = block_shared<float>();
  const std::int64_t D = args.D, t = blockIdx.x;
  const T* x = args.x + matrix_offset(t, 0, D);
  const T* dy = args.dy + matrix_offset(t, 0, D);
  T* dx = args.dx + matrix_offset(t, 0, D);
  const bool wide = is_wide(x, dy, dx, args.weight);
  const float mean = args.layer_norm ? args.mean[t] : 0, rstd = args.rstd[t];
  const float offset = args.plus_one ? 1 : 0;
  Group row[kHeld], slopes[kHeld];
  const auto load = [&](int i, std::int64_t d, std::int64_t count) {
    row[i] = load_group(x + d, count, wide);
    slopes[i] = load_group(dy + d, count, wide);  // 0 beyond the end
    const Group weight = load_group(args.weight + d, count, wide);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) slopes[i].at[j] *= offset + weight.at[j];
  };
  float dot = 0, sum = 0;
  for_row<kHeld>(D, false, load, [&](int i, std::int64_t, std::int64_t) {
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      dot += slopes[i].at[j] * (row[i].at[j] - mean) * rstd;
      sum += slopes[i].at[j];
    }
  });
  dot = block_sum(dot, scratch) / static_cast<float>(D);
  sum = args.layer_norm ? block_sum(sum, scratch) / static_cast<float>(D) : 0;
  for_row<kHeld>(D, true, load, [&](int i, std::int64_t d, std::int64_t count) {
    Group out = load_group(dx + d, count, wide);
#pragma unroll
    for (int j = 0; j < kGroup; ++j)
      out.at[j] += rstd * (slopes[i].at[j] - sum - (row[i].at[j] - mean) * rstd * dot);
    store_group(dx + d, out, count, wide);
  });
}

/// Many rows need more threads: a block of columns is all that one multiprocessor works on.
inline int column_threads(std::int64_t rows) {
  return rows >= 1024 ? 1024 : 256;
}

/// Columns of a block: few, so that there are blocks for many multiprocessors, and 32 bytes in bf16.
constexpr int kColumns = 2 * kGroup;

/// Adds up value(row, column, count), a group of columns, over all rows, for the columns of this block, and
/// calls put(column, sum). Two lanes share a row.
template <class Value, class Put>
__device__ inline void reduce_columns(std::int64_t rows, std::int64_t columns, const Value& value,
                                      const Put& put) {
  constexpr int kLanes = kColumns / kGroup;
  float* scratch = block_shared<float>();  // [warps][kColumns]
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kColumns;
  const std::int64_t column = first + lane_id() % kLanes * kGroup;
  Group sum = {};
  if (column < columns)
    for (std::int64_t row = threadIdx.x / kLanes; row < rows; row += blockDim.x / kLanes) {
      const Group group = value(row, column, columns - column);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) sum.at[j] += group.at[j];
    }
  const int j = spread_sums<kGroup, kWarp / 2, kLanes>(sum.at);
  // Two lanes have the same sum.
  if ((lane_id() & kLanes) == 0) scratch[warp_id() * kColumns + lane_id() % kLanes * kGroup + j] = sum.at[0];
  __syncthreads();
  if (warp_id() != 0 || lane_id() >= kColumns || first + lane_id() >= columns) return;
  float total = 0;
  for (int warp = 0; warp < num_warps(); ++warp) total += scratch[warp * kColumns + lane_id()];
  put(first + lane_id(), total);
}

template <class T>
__global__ void norm_grad_weight_kernel(NormGradArgs<T> args) {
  const bool wide = args.D % kVector<T> == 0 && is_wide(args.x, args.dy);
  const auto normalised = [&](std::int64_t t, std::int64_t d, std::int64_t count) {
    const std::int64_t at = matrix_offset(t, d, args.D);
    const Group x = load_group(args.x + at, count, wide);
    const float mean = args.layer_norm ? args.mean[t] : 0, rstd = args.rstd[t];
    Group out = load_group(args.dy + at, count, wide);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) out.at[j] *= (x.at[j] - mean) * rstd;
    return out;
  };
  reduce_columns(args.T_rows, args.D, normalised, [&](std::int64_t d, float sum) { args.dweight[d] += sum; });
}

template <class T>
__global__ void column_sums_kernel(Wide<T>* out, const T* x, std::int64_t rows, std::int64_t n) {
  const bool wide = n % kVector<T> == 0 && is_wide(x);
  reduce_columns(
      rows, n,
      [&](std::int64_t row, std::int64_t column, std::int64_t count) {
        return load_group(x + matrix_offset(row, column, n), count, wide);
      },
      [&](std::int64_t column, float sum) { out[column] += sum; });
}

template <class T>
void norm(const NormArgs<T>& args, std::int64_t rows, void* queue) {
  const RowShape shape = row_shape(args.D);
  const auto kernel = shape.held == 1   ? norm_kernel<T, 1>
                      : shape.held == 2 ? norm_kernel<T, 2>
                                        : norm_kernel<T, 4>;
  launch_early("norm", kernel, dim3(static_cast<unsigned>(rows)), shape.threads, kWarp * sizeof(float), queue,
               args);
}

template <class T>
void add_column_sums(Wide<T>* out, const T* x, std::int64_t rows, std::int64_t n, void* queue) {
  const int threads = column_threads(rows);
  launch("add_column_sums", column_sums_kernel<T>, dim3(static_cast<unsigned>(ceil_div(n, kColumns))),
         threads, static_cast<std::size_t>(threads / kWarp * kColumns) * sizeof(float), queue, out, x, rows,
         n);
}

template <class T>
void norm_grad(const NormGradArgs<T>& args, void* queue) {
  const RowShape shape = row_shape(args.D);
  const auto kernel = shape.held == 1   ? norm_grad_input_kernel<T, 1>
                      : shape.held == 2 ? norm_grad_input_kernel<T, 2>
                                        : norm_grad_input_kernel<T, 4>;
  launch("norm_grad_input", kernel, dim3(static_cast<unsigned>(args.T_rows)), shape.threads,
         kWarp * sizeof(float), queue, args);
  const int threads = column_threads(args.T_rows);
  if (args.dweight)
    launch("norm_grad_weight", norm_grad_weight_kernel<T>,
           dim3(static_cast<unsigned>(ceil_div(args.D, kColumns))), threads,
           static_cast<std::size_t>(threads / kWarp * kColumns) * sizeof(float), queue, args);
  if (args.dbias) add_column_sums<T>(args.dbias, args.dy, args.T_rows, args.D, queue);
}

}  // namespace rlhf::kernels::RLHF_GPU

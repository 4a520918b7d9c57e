#pragma once
// Products of matrices without tensor cores: 64 x 64 outputs per block of 256 threads, 16 of the inner
// dimension at a time through shared memory, 4 x 4 outputs per thread, sums in float. Any strides, any edge.
// The reference for the library product (blas.h) and what runs where that library is missing. Every output is
// summed over k in order, whatever M and N. Bound: float FMA throughput.

#include "rlhf/kernels/cuda/reduce.cuh"
#include "rlhf/kernels/device_kernels.h"

namespace rlhf::kernels::RLHF_GPU {

constexpr int kTile = 64, kTileK = 16, kPerThread = 4, kProductThreads = 256;
constexpr int kTileStride = kTile + 1;  // one more, so that columns fall into different banks

/// c[M, N] (+)= a b + bias with a(i, k) = a[i * a_row + k * a_column] and b(k, j) = b[k * b_row + j *
/// b_column].
template <class T, class C>
struct ProductArgs {
  const T* a;
  std::int64_t a_row, a_column;
  const T* b;
  std::int64_t b_row, b_column;
  const T* bias;
  C* c;
  std::int64_t ldc, M, N, K;
  bool accumulate;
};

/// Brings x(i, k) for i in [first, first + kTile), k in [k0, k0 + kTileK) to shared memory as tile[k][i],
/// zero outside. Neighbouring threads read along the dimension whose stride is 1.
template <class T>
__device__ inline void load_tile(float* tile, const T* x, std::int64_t stride, std::int64_t k_stride,
                                 std::int64_t first, std::int64_t count, std::int64_t k0, std::int64_t K) {
  for (int e = static_cast<int>(threadIdx.x); e < kTile * kTileK; e += kProductThreads) {
    const int i = k_stride == 1 ? e / kTileK : e % kTile, k = k_stride == 1 ? e % kTileK : e / kTile;
    const bool inside = first + i < count && k0 + k < K;
    tile[k * kTileStride + i] = inside ? to_float(x[(first + i) * stride + (k0 + k) * k_stride]) : 0;
  }
}

template <class T, class C>
__global__ void product_kernel(ProductArgs<T, C> args) {
  float* a_tile = block_shared<float>();          // [kTileK][kTileStride]
  float* b_tile = a_tile + kTileK * kTileStride;  // [kTileK][kTileStride]
  const std::int64_t columns = ceil_div(args.N, kTile);
  const std::int64_t i0 = blockIdx.x / columns * kTile, j0 = blockIdx.x % columns * kTile;
  const int ti = static_cast<int>(threadIdx.x) / 16, tj = static_cast<int>(threadIdx.x) % 16;
  float sum[kPerThread][kPerThread] = {};
  for (std::int64_t k0 = 0; k0 < args.K; k0 += kTileK) {
    load_tile(a_tile, args.a, args.a_row, args.a_column, i0, args.M, k0, args.K);
    load_tile(b_tile, args.b, args.b_column, args.b_row, j0, args.N, k0, args.K);
    __syncthreads();
    for (int k = 0; k < kTileK; ++k) {
      float a[kPerThread], b[kPerThread];
#pragma unroll
      for (int r = 0; r < kPerThread; ++r) {
        a[r] = a_tile[k * kTileStride + ti + 16 * r];
        b[r] = b_tile[k * kTileStride + tj + 16 * r];
      }
#pragma unroll
      for (int r = 0; r < kPerThread; ++r)
#pragma unroll
        for (int s = 0; s < kPerThread; ++s) sum[r][s] += a[r] * b[s];
    }
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < kPerThread; ++r)
#pragma unroll
    for (int s = 0; s < kPerThread; ++s) {
      const std::int64_t i = i0 + ti + 16 * r, j = j0 + tj + 16 * s;
      if (i >= args.M || j >= args.N) continue;
      C& out = args.c[matrix_offset(i, j, args.ldc)];
      float value = sum[r][s];
      if (args.bias) value += to_float(args.bias[j]);
      if (args.accumulate) value += to_float(out);
      out = from_float<C>(value);
    }
}

template <class T, class C>
void product(const ProductArgs<T, C>& args, void* queue) {
  const std::int64_t blocks = ceil_div(args.M, kTile) * ceil_div(args.N, kTile);
  launch("product", product_kernel<T, C>, dim3(static_cast<unsigned>(blocks)), kProductThreads,
         2 * kTileK * kTileStride * sizeof(float), queue, args);
}

template <class T, class Y>
void linear(const LinearArgs<T, Y>& args, std::int64_t M, std::int64_t N, void* queue) {
  product<T, Y>(
      {args.x, args.ldx, 1, args.w, 1, args.K, args.bias, args.y, args.ldy, M, N, args.K, args.accumulate},
      queue);
}

template <class T, class C>
void gemm(const GemmArgs<T, C>& args, void* queue) {
  product<T, C>({args.a, args.a_row_stride, args.a_col_stride, args.b, args.ldb, 1, nullptr, args.c, args.ldc,
                 args.M, args.N, args.K, args.accumulate},
                queue);
}

}  // namespace rlhf::kernels::RLHF_GPU

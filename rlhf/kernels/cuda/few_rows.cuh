#pragma once
// Products of few rows with weights, for decoding: y[M, N] (+)= x[M, K] w[N, K]^T with M up to kFewRows.
// Bound: reading w once. On tensor cores, with 8 outputs and up to 16 rows a warp; its lanes read w 16 bytes
// at a time from memory into the fragment, with the elements of K in an order of their own: which of them
// meet in one product does not matter as long as x has the same order. Warps share the sum over K where there
// are few outputs, and are added in order.
//
// The norm before such a product is applied to x as it is read, and the activation behind it to the outputs:
// a decode step of few rows is a chain of short kernels, and each one less counts.

#include "rlhf/kernels/cuda/elementwise.cuh"
#include "rlhf/kernels/cuda/mma.cuh"

namespace rlhf::kernels::RLHF_GPU {

constexpr int kFewWarps = 8, kFewThreads = kFewWarps * kWarp;
constexpr int kTileOutputs = 8, kTileSums = static_cast<int>(kFewRows) * kTileOutputs;
constexpr int kStepK = 32;      // elements of K that a warp takes at a time: 8 a lane, two products
constexpr int kStepsAhead = 4;  // steps whose loads are in flight

/// 8 elements of a row of x at k as the product takes them; zeros beyond the rows and beyond K.
struct FewRowsInput {
  const FewRowsArgs<Bfloat16>& args;
  const float* mean;  ///< [kFewRows]
  const float* rstd;  ///< [kFewRows]

  __device__ Words load(std::int64_t m, std::int64_t k) const {
    return m < args.M && k < args.product.K
               ? load_words(args.product.x + matrix_offset(m, k, args.product.ldx))
               : Words{};
  }
  __device__ Words prepare(Words x, std::int64_t m, std::int64_t k) const {
    if (!args.norm.weight || m >= args.M || k >= args.product.K) return x;
    const Words weight = load_words(args.norm.weight + k);
    const Words bias = args.norm.bias ? load_words(args.norm.bias + k) : Words{};
    const float offset = args.norm.plus_one ? 1 : 0;
    float out[kGroup];
#pragma unroll
    for (int j = 0; j < kGroup; ++j)
      out[j] = (element<Bfloat16>(x, j) - mean[m]) * rstd[m] * (offset + element<Bfloat16>(weight, j)) +
               element<Bfloat16>(bias, j);
#pragma unroll
    for (int j = 0; j < kGroup; j += 2) x.at[j / 2] = round_pair(out[j], out[j + 1]);
    return x;
  }
};

/// Mean (of LayerNorm) and reciprocal deviation of every row, a warp a row.
__device__ inline void row_statistics(const FewRowsArgs<Bfloat16>& args, float* means, float* rstds) {
  const std::int64_t K = args.product.K;
  for (std::int64_t m = warp_id(); m < args.M; m += kFewWarps) {
    const Bfloat16* x = args.product.x + matrix_offset(m, 0, args.product.ldx);
    const auto sum_row = [&](const auto& fn) {
      float sum = 0;
      for (std::int64_t k = lane_id() * kGroup; k < K; k += kWarp * kGroup) {
        const Words words = load_words(x + k);
#pragma unroll
        for (int j = 0; j < kGroup; ++j) sum += fn(element<Bfloat16>(words, j));
      }
      return warp_sum(sum) / static_cast<float>(K);
    };
    const float mean = args.norm.layer_norm ? sum_row([](float v) { return v; }) : 0;
    const float square = sum_row([&](float v) { return (v - mean) * (v - mean); });
    if (lane_id() != 0) continue;
    means[m] = mean;
    rstds[m] = 1 / sqrtf(square + static_cast<float>(args.norm.eps));
  }
}

/// Sums of one warp: its tile of every one of kTiles halves of the outputs, over its share of K.
template <int kTiles>
__device__ inline void add_products(const FewRowsInput& x, std::int64_t first_output, std::int64_t outputs,
                                    int share, int shares, float (&sums)[kTiles][4]) {
  const LinearArgs<Bfloat16>& product = x.args.product;
  const std::int64_t row = lane_id() / 4, lane_k = lane_id() % 4 * kGroup;
  const bool two = x.args.M > 8, inside = first_output + row < outputs;
  const Bfloat16* w = product.w + matrix_offset(first_output + row, 0, product.K);
  const std::int64_t half =
      matrix_offset(outputs, 0, product.K);  // from a tile to its partner in the other half
  for (std::int64_t step = share; step * kStepK < product.K;
       step += static_cast<std::int64_t>(shares) * kStepsAhead) {
    Words weights[kStepsAhead][kTiles], low[kStepsAhead], high[kStepsAhead];
#pragma unroll
    for (int s = 0; s < kStepsAhead; ++s) {
      const std::int64_t k = (step + static_cast<std::int64_t>(s) * shares) * kStepK + lane_k;
#pragma unroll
      for (int i = 0; i < kTiles; ++i)
        weights[s][i] = inside && k < product.K ? load_words(w + (i * half + k)) : Words{};
      low[s] = x.load(row, k);
      high[s] = two ? x.load(row + 8, k) : Words{};
    }
#pragma unroll
    for (int s = 0; s < kStepsAhead; ++s) {
      const std::int64_t k = (step + static_cast<std::int64_t>(s) * shares) * kStepK + lane_k;
      const Words a = x.prepare(low[s], row, k), b = two ? x.prepare(high[s], row + 8, k) : Words{};
#pragma unroll
      for (int i = 0; i < kTiles; ++i)
#pragma unroll
        for (int j = 0; j < 4; j += 2)
          multiply_add(sums[i], {a.at[j], b.at[j], a.at[j + 1], b.at[j + 1]}, weights[s][i].at[j],
                       weights[s][i].at[j + 1]);
    }
  }
}

/// kTiles is 2 where an activation multiplies two halves of the outputs, else 1. `shares` warps add up a
/// tile.
template <int kTiles>
__global__ void __launch_bounds__(kFewThreads)
    few_rows_kernel(FewRowsArgs<Bfloat16> args, std::int64_t outputs, int shares) {
  float* partial = block_shared<float>();  // [warps][kTiles][kFewRows][kTileOutputs]
  float* means = partial + kFewWarps * kTiles * kTileSums;
  float* rstds = means + kFewRows;
  const LinearArgs<Bfloat16>& product = args.product;
  if (args.norm.weight) {
    row_statistics(args, means, rstds);
    __syncthreads();
  }
  const int tiles = kFewWarps / shares, share = warp_id() % shares;
  const std::int64_t first_tile = static_cast<std::int64_t>(blockIdx.x) * tiles;
  float sums[kTiles][4] = {};
  add_products<kTiles>({args, means, rstds}, (first_tile + warp_id() / shares) * kTileOutputs, outputs, share,
                       shares, sums);
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      partial[(warp_id() * kTiles + i) * kTileSums + (lane_id() / 4 + j / 2 * 8) * kTileOutputs +
              lane_id() % 4 * 2 + j % 2] = sums[i][j];
  __syncthreads();

  for (int e = static_cast<int>(threadIdx.x); e < tiles * kTileSums; e += kFewThreads) {
    const int tile = e / kTileSums, m = e % kTileSums / kTileOutputs;
    const std::int64_t n = (first_tile + tile) * kTileOutputs + e % kTileOutputs;
    if (m >= args.M || n >= outputs) continue;
    float value[kTiles];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      value[i] = product.bias ? to_float(product.bias[i * outputs + n]) : 0;
      for (int s = 0; s < shares; ++s)
        value[i] += partial[((tile * shares + s) * kTiles + i) * kTileSums + e % kTileSums];
    }
    Bfloat16& y = product.y[matrix_offset(m, n, product.ldy)];
    if constexpr (kTiles == 2) {  // rounded as if they had been stored
      Group gate{};
      gate.at[0] = to_float(from_float<Bfloat16>(value[0]));
      y = from_float<Bfloat16>(activate(gate, args.activation).value.at[0] *
                               to_float(from_float<Bfloat16>(value[1])));
    } else {
      y = from_float<Bfloat16>(product.accumulate ? to_float(y) + value[0] : value[0]);
    }
  }
}

inline void few_rows_linear(const FewRowsArgs<Bfloat16>& args, std::int64_t N, void* queue) {
  RLHF_CHECK(takes_few_rows(args) && !(args.gated && args.product.accumulate),
             "CUDA: a product of few rows needs at most ", kFewRows, " of them, at multiples of 16 bytes");
  const std::int64_t tiles = ceil_div(N, kTileOutputs);
  if (args.M == 0 || N == 0) return;
  // Some 1000 warps keep the memory of a large GPU busy.
  int shares = 1;
  while (shares < kFewWarps && tiles * shares < 1024) shares *= 2;
  const auto blocks = dim3(static_cast<unsigned>(ceil_div(tiles, kFewWarps / shares)));
  const auto shared = [](int halves) {
    return (static_cast<std::size_t>(halves) * kFewWarps * kTileSums +
            2 * static_cast<std::size_t>(kFewRows)) *
           sizeof(float);
  };
  if (args.gated)
    launch("few_rows_linear", few_rows_kernel<2>, blocks, kFewThreads, shared(2), queue, args, N, shares);
  else
    launch("few_rows_linear", few_rows_kernel<1>, blocks, kFewThreads, shared(1), queue, args, N, shares);
}

}  // namespace rlhf::kernels::RLHF_GPU

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
constexpr int kStepK = 32;             // elements of K that a warp takes at a time: 8 a lane, two products
constexpr int kPieceElements = 16384;  // of x in shared memory

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

/// What a warp reads of w: its tile of every one of kTiles halves of the outputs, over its share of K. The
/// loads of the next kAhead steps are under way: bytes in flight are what the speed of memory takes.
template <int kTiles>
struct WeightStream {
  static constexpr int kAhead = 8;
  // What add_products takes in a round is part of every piece of x.
  static_assert(kPieceElements / 16 % (kStepK * kAhead * kFewWarps / 2) == 0 &&
                kPieceElements / 8 % (kStepK * kAhead * kFewWarps) == 0);
  const Bfloat16* w;  ///< the lane's first 8 elements
  std::int64_t half;  ///< from a tile to its partner in the other half
  std::int64_t K;
  int lane_k;
  bool inside;
  Words at[kAhead][kTiles];

  __device__ void load(int slot, std::int64_t step) {
    const bool there = inside && step * kStepK + lane_k < K;
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
      at[slot][i] = there ? load_words(w + (i * half + step * kStepK)) : Words{};
  }
};

template <int kTiles>
__device__ inline WeightStream<kTiles> open_weights(const LinearArgs<Bfloat16>& product,
                                                    std::int64_t first_output, std::int64_t outputs,
                                                    int share, int shares) {
  const std::int64_t row = first_output + lane_id() / 4;
  const int lane_k = lane_id() % 4 * kGroup;
  WeightStream<kTiles> stream = {product.w + matrix_offset(row, lane_k, product.K),
                                 matrix_offset(outputs, 0, product.K),
                                 product.K,
                                 lane_k,
                                 row < outputs,
                                 {}};
#pragma unroll
  for (int s = 0; s < stream.kAhead; ++s) stream.load(s, share + s * shares);
  return stream;
}

/// Elements of K of a piece of x that fits shared memory, and the distance of its rows there: eight of them
/// lie in different banks.
struct RowPiece {
  int elements, stride;
};
RLHF_HOST_DEVICE inline RowPiece row_piece(std::int64_t M) {
  int rows = 1;
  while (rows < M) rows *= 2;
  const int elements = kPieceElements / rows;
  return {elements, elements + kStepK};
}

/// Brings elements [k0, k0 + piece.elements) of every row to shared memory, normed where there is a norm.
__device__ inline void stage_rows(const FewRowsArgs<Bfloat16>& args, const float* means, const float* rstds,
                                  std::int64_t k0, RowPiece piece, Bfloat16* to) {
  const std::int64_t left = args.product.K - k0;
  const int groups = static_cast<int>(left < piece.elements ? left : piece.elements) / kGroup;
  const float offset = args.norm.plus_one ? 1 : 0;
  for (int e = static_cast<int>(threadIdx.x); e < groups * static_cast<int>(args.M); e += kFewThreads) {
    const int m = e / groups, k = e % groups * kGroup;
    Words x = load_words(args.product.x + matrix_offset(m, k0 + k, args.product.ldx));
    if (args.norm.weight) {
      const Words weight = load_words(args.norm.weight + k0 + k);
      const Words bias = args.norm.bias ? load_words(args.norm.bias + k0 + k) : Words{};
      float out[kGroup];
#pragma unroll
      for (int j = 0; j < kGroup; ++j)
        out[j] = (element<Bfloat16>(x, j) - means[m]) * rstds[m] * (offset + element<Bfloat16>(weight, j)) +
                 element<Bfloat16>(bias, j);
#pragma unroll
      for (int j = 0; j < kGroup; j += 2) x.at[j / 2] = round_pair(out[j], out[j + 1]);
    }
    store_words(to + m * piece.stride + k, x);
  }
}

/// The steps of this warp in [first, end), from the piece of x that begins with step `begin`. @return the
/// next
template <int kTiles>
__device__ inline std::int64_t add_products(const FewRowsArgs<Bfloat16>& args, const Bfloat16* x,
                                            RowPiece piece, std::int64_t begin, std::int64_t first,
                                            std::int64_t end, int shares, WeightStream<kTiles>& weights,
                                            float (&sums)[kTiles][4]) {
  constexpr int kAhead = WeightStream<kTiles>::kAhead;
  const int row = lane_id() / 4;
  const bool low = row < args.M, high = row + 8 < args.M;
  const Bfloat16* lane_x = x + row * piece.stride + weights.lane_k;
  for (; first < end; first += kAhead * shares) {
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      const std::int64_t step = first + s * shares;
      if (step >= end) return step;
      const int k = static_cast<int>(step - begin) * kStepK;
      const bool inside = step * kStepK + weights.lane_k < weights.K;
      const Words a = low && inside ? load_words(lane_x + k) : Words{},
                  b = high && inside ? load_words(lane_x + 8 * piece.stride + k) : Words{};
#pragma unroll
      for (int i = 0; i < kTiles; ++i)
#pragma unroll
        for (int j = 0; j < 4; j += 2)
          multiply_add(sums[i], {a.at[j], b.at[j], a.at[j + 1], b.at[j + 1]}, weights.at[s][i].at[j],
                       weights.at[s][i].at[j + 1]);
      weights.load(s, step + kAhead * shares);
    }
  }
  return first;
}

/// kTiles is 2 where an activation multiplies two halves of the outputs, else 1. `shares` warps add up a
/// tile.
template <int kTiles>
__global__ void __launch_bounds__(kFewThreads)
    few_rows_kernel(FewRowsArgs<Bfloat16> args, std::int64_t outputs, int shares) {
  float* partial = block_shared<float>();  // [warps][kTiles][kFewRows][kTileOutputs]
  float* means = partial + kFewWarps * kTiles * kTileSums;
  float* rstds = means + kFewRows;
  auto* x = reinterpret_cast<Bfloat16*>(rstds + kFewRows);
  const LinearArgs<Bfloat16>& product = args.product;
  const int tiles = kFewWarps / shares, share = warp_id() % shares;
  const std::int64_t first_tile = static_cast<std::int64_t>(blockIdx.x) * tiles;
  WeightStream<kTiles> weights =
      open_weights<kTiles>(product, (first_tile + warp_id() / shares) * kTileOutputs, outputs, share, shares);
  follow_last_kernel();
  if (args.norm.weight) row_statistics(args, means, rstds);
  float sums[kTiles][4] = {};
  const RowPiece piece = row_piece(args.M);
  std::int64_t next = share;
  for (std::int64_t k0 = 0; k0 < product.K; k0 += piece.elements) {
    __syncthreads();  // statistics are there, and nobody needs the piece before
    stage_rows(args, means, rstds, k0, piece, x);
    __syncthreads();
    const std::int64_t end =
        ceil_div(product.K < k0 + piece.elements ? product.K : k0 + piece.elements, kStepK);
    next = add_products<kTiles>(args, x, piece, k0 / kStepK, next, end, shares, weights, sums);
  }
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
  // Some 1000 warps keep the memory of a large GPU busy. A piece of x is a whole number of rounds of the
  // warps.
  const int most = args.M > 8 ? kFewWarps / 2 : kFewWarps;
  int shares = 1;
  while (shares < most && tiles * shares < 1024) shares *= 2;
  const RowPiece piece = row_piece(args.M);
  const auto blocks = dim3(static_cast<unsigned>(ceil_div(tiles, kFewWarps / shares)));
  const auto shared = [&](int halves) {
    return (static_cast<std::size_t>(halves) * kFewWarps * kTileSums +
            2 * static_cast<std::size_t>(kFewRows)) *
               sizeof(float) +
           static_cast<std::size_t>(args.M * piece.stride) * sizeof(Bfloat16);
  };
  if (args.gated)
    launch_early("few_rows_linear", few_rows_kernel<2>, blocks, kFewThreads, shared(2), queue, args, N,
                 shares);
  else
    launch_early("few_rows_linear", few_rows_kernel<1>, blocks, kFewThreads, shared(1), queue, args, N,
                 shares);
}

}  // namespace rlhf::kernels::RLHF_GPU

#pragma once
// The inner product of all matrix products: a tile of C in registers, summed over a block of k in order, from
// rows of A and a packed panel of B. Per k a 6 x 4-vector tile needs 4 vector loads and 6 broadcasts for 24
// FMAs, so FMA throughput is the bound.

#include <algorithm>

#include "rlhf/kernels/cpu/vec.h"

namespace rlhf::kernels::RLHF_ISA {

inline constexpr int kTileRows = 6;
/// A sum over more than this many k is a sum of block sums. A packed block of 384 x 64 floats takes 96 KiB: a
/// tenth of a 1 MiB L2.
inline constexpr std::int64_t kBlockK = 384;

template <class T>
inline constexpr int kPanelColumns = kPanelVecs* kLanes<T>;

template <class T>
struct TileArgs {
  const T* a;  ///< first element of the tile's first row
  std::int64_t a_row_stride, a_col_stride;
  const T* packed;  ///< [count, kPanelColumns]
  std::int64_t count;
  T* c;
  std::int64_t ldc, columns;
  const T* bias;  ///< [columns] or null
  bool accumulate;
  /// Memory that will be packed next, `ahead_rows` rows of `count`: fetched while the tiles are computed.
  const T* ahead = nullptr;
  std::int64_t ahead_stride = 0, ahead_rows = 0;
};

template <class T, int MR>
void put_tile(const TileArgs<T>& args, const Vec<T> (&sums)[MR][kPanelVecs]) {
  constexpr int L = kLanes<T>;
  for (int i = 0; i < MR; ++i) {
    T* c = args.c + i * args.ldc;
    if (args.columns == kPanelColumns<T>) {
      for (int v = 0; v < kPanelVecs; ++v) {
        Vec<T> sum = sums[i][v];
        if (args.bias) sum += load(args.bias + v * L);
        store(c + v * L, args.accumulate ? load(c + v * L) + sum : sum);
      }
      continue;
    }
    alignas(kVecBytes) T row[kPanelColumns<T>];
    for (int v = 0; v < kPanelVecs; ++v) store(row + v * L, sums[i][v]);
    for (std::int64_t j = 0; j < args.columns; ++j) {
      const T sum = args.bias ? row[j] + args.bias[j] : row[j];
      c[j] = args.accumulate ? c[j] + sum : sum;
    }
  }
}

/// kRows: the rows of A are contiguous (a_col_stride 1).
template <class T, int MR, bool kRows>
void tile(const TileArgs<T>& args) {
  constexpr int L = kLanes<T>;
  Vec<T> sums[MR][kPanelVecs] = {};
  const T* a = args.a;
  const T* packed = args.packed;
  const std::int64_t stride = kRows ? args.a_row_stride : args.a_col_stride;
  const auto add = [&](std::int64_t k) {
    Vec<T> b[kPanelVecs];
    for (int v = 0; v < kPanelVecs; ++v) b[v] = load(packed + v * L);
    for (int i = 0; i < MR; ++i) {
      const T value = kRows ? a[i * stride + k] : a[k * stride + i];
      for (int v = 0; v < kPanelVecs; ++v) sums[i][v] += value * b[v];
    }
    packed += kPanelColumns<T>;
  };
  std::int64_t k = 0;
  if constexpr (kRows)
    for (; k + L <= args.count; k += L) {
      // The next tile's rows: too short for the hardware to see a stream in them.
      for (int i = 0; i < MR; ++i) __builtin_prefetch(a + (i + MR) * stride + k);
      for (std::int64_t r = 0; r < args.ahead_rows; ++r)
        __builtin_prefetch(args.ahead + r * args.ahead_stride + k, 0, 2);
      for (int step = 0; step < L; ++step) add(k + step);
    }
  for (; k < args.count; ++k) add(k);
  put_tile<T, MR>(args, sums);
}

/// Rows [i0, i1) of the `columns` columns that a packed block of B holds. `args.a` and `args.c` are row 0.
template <class T>
void tiles(TileArgs<T> args, std::int64_t i0, std::int64_t i1) {
  const T* a = args.a;
  T* c = args.c;
  std::int64_t ahead_left = args.ahead_rows;
  const std::int64_t ahead_per_tile = ceil_div(ahead_left, ceil_div(i1 - i0, std::int64_t{kTileRows}));
  for (std::int64_t i = i0; i < i1; i += kTileRows) {
    args.a = a + i * args.a_row_stride;
    args.c = c + i * args.ldc;
    args.ahead_rows = std::min(ahead_left, ahead_per_tile);
    with_count<kTileRows>(std::min<std::int64_t>(kTileRows, i1 - i), [&]<int MR>() {
      if (args.a_col_stride == 1)
        tile<T, MR, true>(args);
      else
        tile<T, MR, false>(args);
    });
    args.ahead += args.ahead_rows * args.ahead_stride;
    ahead_left -= args.ahead_rows;
  }
}

}  // namespace rlhf::kernels::RLHF_ISA

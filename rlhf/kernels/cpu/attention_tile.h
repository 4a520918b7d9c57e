#pragma once
// What attention and its gradient share: a few queries against one block of keys.

#include <algorithm>
#include <cmath>

#include "rlhf/kernels/cpu/exp.h"
#include "rlhf/kernels/cpu/vec.h"
#include "rlhf/kernels/kernel_table.h"

namespace rlhf::kernels::RLHF_ISA {

inline constexpr std::int64_t kB = kBlockTokens;
template <class T>
inline constexpr int kKeyVecs = static_cast<int>(kB) / kLanes<T>;
#if defined(__AVX512F__)
inline constexpr int kQueries = 8;
#else
inline constexpr int kQueries = 4;
#endif

/// Positions inside a block; empty when begin >= end.
struct KeyRange {
  std::int64_t begin, end;
};

inline KeyRange visible(std::int64_t block, std::int64_t first_key, std::int64_t num_keys) {
  const std::int64_t base = block * kB;
  return {first_key > base ? first_key - base : 0, num_keys - base < kB ? num_keys - base : kB};
}

/// The block that is read after this one; blocks lie anywhere in the cache, so only the table says where.
template <class T>
struct NextBlock {
  const T* k = nullptr;
  const T* v = nullptr;
};

/// dots[i][j] = sum over h of q[i][h] k[h][j], in order of h.
template <class T, int QN>
inline void dot_keys(const T* const* q, std::int64_t H, const T* k, T (*dots)[kB], NextBlock<T> next = {}) {
  Vec<T> sums[QN][kKeyVecs<T>] = {};
  for (std::int64_t h = 0; h < H; ++h, k += kB) {
    if (next.k) {
      __builtin_prefetch(next.k + h * kB);
      __builtin_prefetch(next.v + h * kB);
    }
    for (int v = 0; v < kKeyVecs<T>; ++v) {
      const Vec<T> keys = load(k + v * kLanes<T>);
      for (int i = 0; i < QN; ++i) sums[i][v] += q[i][h] * keys;
    }
  }
  for (int i = 0; i < QN; ++i)
    for (int v = 0; v < kKeyVecs<T>; ++v) store(dots[i] + v * kLanes<T>, sums[i][v]);
}

/// Scales and caps dot products in place; -inf outside the visible keys.
template <class T>
inline void finish_scores(const AttentionArgs<T>& args, KeyRange keys, T* scores) {
  const T scale = static_cast<T>(args.scale), cap = static_cast<T>(args.softcap);
  for (std::int64_t j = 0; j < kB; ++j) scores[j] *= scale;
  if (cap > 0)
    for (std::int64_t j = 0; j < kB; ++j) scores[j] = cap * tanh_approx(scores[j] / cap);
  if (keys.begin > 0 || keys.end < kB)
    for (std::int64_t j = 0; j < kB; ++j)
      if (j < keys.begin || j >= keys.end) scores[j] = -INFINITY;
}

template <class T>
inline T largest(const T* scores) {
  T half[kB];
  std::copy_n(scores, kB, half);
  for (std::int64_t width = kB / 2; width > 0; width /= 2)
    for (std::int64_t j = 0; j < width; ++j) half[j] = half[j + width] > half[j] ? half[j + width] : half[j];
  return half[0];
}

template <class T>
inline T sum_of_lanes(const Vec<T> (&vectors)[kKeyVecs<T>]) {
  alignas(kVecBytes) T half[kB];
  for (int v = 0; v < kKeyVecs<T>; ++v) store(half + v * kLanes<T>, vectors[v]);
  for (std::int64_t width = kB / 2; width > 0; width /= 2)
    for (std::int64_t j = 0; j < width; ++j) half[j] += half[j + width];
  return half[0];
}

/// out[H] += sum over j of weights[j] rows[j][H], in order of j, for a whole block.
template <class T>
inline void add_weighted_rows(const T* all_weights, const T* rows, std::int64_t H, T* out) {
  T weights[kB];  // not aliased by out: stays in registers
  std::copy_n(all_weights, kB, weights);
#pragma omp simd
  for (std::int64_t h = 0; h < H; ++h) {
    T sum = out[h];
    for (std::int64_t j = 0; j < kB; ++j) sum += weights[j] * rows[j * H + h];
    out[h] = sum;
  }
}

}  // namespace rlhf::kernels::RLHF_ISA

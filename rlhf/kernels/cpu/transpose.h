#pragma once
// A square of vectors transposed in registers, as many rows as a vector has lanes.

#include <type_traits>

#include "rlhf/kernels/cpu/vec.h"

namespace rlhf::kernels::RLHF_ISA {

template <class T>
struct ShuffleMask {
  using Index = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;
  typedef Index Vec __attribute__((vector_size(kVecBytes)));
};

/// Exchanges the two off-diagonal kDistance x kDistance squares of every square of twice that size.
template <class T, int kDistance>
inline void exchange_squares(Vec<T> (&rows)[kLanes<T>]) {
  constexpr int L = kLanes<T>;
  typename ShuffleMask<T>::Vec upper, lower;
  for (int c = 0; c < L; ++c) {
    const bool right = c & kDistance;
    upper[c] = right ? L + c - kDistance : c;
    lower[c] = right ? L + c : c + kDistance;
  }
  for (int i = 0; i < L; ++i) {
    if (i & kDistance) continue;
    const Vec<T> a = rows[i], b = rows[i + kDistance];
    rows[i] = __builtin_shuffle(a, b, upper);
    rows[i + kDistance] = __builtin_shuffle(a, b, lower);
  }
}

template <class T>
inline void transpose(Vec<T> (&rows)[kLanes<T>]) {
  constexpr int L = kLanes<T>;
  if constexpr (L > 8) exchange_squares<T, 8>(rows);
  if constexpr (L > 4) exchange_squares<T, 4>(rows);
  if constexpr (L > 2) exchange_squares<T, 2>(rows);
  exchange_squares<T, 1>(rows);
}

}  // namespace rlhf::kernels::RLHF_ISA

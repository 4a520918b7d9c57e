#pragma once
// Vector types of the instruction set this file is compiled for. Every source in this folder is compiled once
// per instruction set with RLHF_ISA naming the namespace, so nothing here may have external linkage outside
// of it.

#include <cstdint>
#include <cstring>

namespace rlhf::kernels::RLHF_ISA {

#if defined(__AVX512F__)
inline constexpr int kVecBytes = 64;
inline constexpr int kPanelVecs = 4;  // 6 x 4 accumulators + 4 + 1 of 32 registers
#elif defined(__AVX2__)
inline constexpr int kVecBytes = 32;
inline constexpr int kPanelVecs = 2;  // 6 x 2 accumulators + 2 + 1 of 16 registers
#else
inline constexpr int kVecBytes = 16;
inline constexpr int kPanelVecs = 2;
#endif

template <class T>
inline constexpr int kLanes = kVecBytes / static_cast<int>(sizeof(T));

template <class T>
struct VecTypes {
  typedef T Vec __attribute__((vector_size(kVecBytes)));
  typedef T Unaligned __attribute__((vector_size(kVecBytes), aligned(sizeof(T)), may_alias));
};
template <class T>
using Vec = typename VecTypes<T>::Vec;

template <class T>
inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VecTypes<T>::Unaligned*>(p);
}
template <class T>
inline void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VecTypes<T>::Unaligned*>(p) = v;
}
template <class T>
inline Vec<T> load_partial(const T* p, std::int64_t count) {
  alignas(kVecBytes) T lanes[kLanes<T>] = {};
  std::memcpy(lanes, p, static_cast<std::size_t>(count) * sizeof(T));
  return load(lanes);
}

/// Calls fn.template operator()<N>() for N = count, 1 to Most: loops over rows whose number is known when
/// they are compiled, so that their sums stay in registers.
template <int Most, class Fn>
inline void with_count(std::int64_t count, const Fn& fn) {
  if constexpr (Most > 0) {
    if (count < Most)
      with_count<Most - 1>(count, fn);
    else
      fn.template operator()<Most>();
  }
}

}  // namespace rlhf::kernels::RLHF_ISA

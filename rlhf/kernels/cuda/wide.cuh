#pragma once
// Sixteen bytes per access: a load of 2 bytes costs as much as one of 16, and memory is only kept busy by
// many bytes in flight. A kernel works on groups of elements; how a group is loaded (at once, or element by
// element where the address is not a multiple of 16 or the row ends) never changes what is computed from it.

#include <cstdint>

#include "rlhf/kernels/bfloat16.h"
#include "rlhf/kernels/cuda/reduce.cuh"
#include "rlhf/kernels/float8.h"

namespace rlhf::kernels::RLHF_GPU {

/// Elements in 16 bytes.
template <class T>
constexpr int kVector = static_cast<int>(16 / sizeof(T));

__device__ inline bool is_wide(const void* p) {
  return reinterpret_cast<std::uintptr_t>(p) % 16 == 0;
}
template <class... Pointers>
__device__ inline bool is_wide(const void* p, Pointers... others) {
  return is_wide(p) && is_wide(others...);
}

/// 16 bytes as they lie in memory; half the registers of the floats they stand for.
struct Words {
  std::uint32_t at[4];
};

__device__ inline Words load_words(const void* from) {
  Words words;
  load_16_bytes(words.at, from);
  return words;
}
__device__ inline void store_words(void* to, const Words& words) {
  store_16_bytes(to, words.at);
}

/// What makes up for half of element()'s unit: its square times element() is the number.
template <class T>
constexpr float kHalfUnit = 1;
template <>
constexpr float kHalfUnit<Float8> = 0x1p60F;

/// Element j of T in words; of Float8 2^-120 times it, which costs no multiplication.
template <class T>
__device__ inline float element(const Words& words, int j) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return __builtin_bit_cast(float, words.at[j]);
  } else if constexpr (sizeof(T) == sizeof(Float8)) {
    return __builtin_bit_cast(float, float8_bits(words.at[j / 4] << (24 - j % 4 * 8)));
  } else {
    const std::uint32_t pair = words.at[j / 2];
    return __builtin_bit_cast(float, j % 2 == 0 ? pair << 16 : pair & 0xFFFF0000U);
  }
}

/// kVector elements from x on, of which the first `count` exist; zero beyond.
template <class T>
__device__ inline Words load_elements(const T* x, std::int64_t count, bool wide) {
  if (wide && count >= kVector<T>) return load_words(x);
  Words words = {};
#pragma unroll
  for (int j = 0; j < kVector<T>; ++j) {
    if (j >= count) continue;
    if constexpr (sizeof(T) == sizeof(float))
      words.at[j] = __builtin_bit_cast(std::uint32_t, x[j]);
    else if constexpr (sizeof(T) == sizeof(Float8))
      words.at[j / 4] |= static_cast<std::uint32_t>(x[j].bits) << (j % 4 * 8);
    else
      words.at[j / 2] |= static_cast<std::uint32_t>(x[j].bits) << (j % 2 * 16);
  }
  return words;
}

/// Elements that a thread of a row kernel handles at a time, of any type.
constexpr int kGroup = 8;
struct Group {
  float at[kGroup];
};

template <class T>
__device__ inline Group load_group(const T* x, std::int64_t count, bool wide) {
  Words words[kGroup / kVector<T>];
#pragma unroll
  for (int i = 0; i < kGroup / kVector<T>; ++i)
    words[i] = load_elements(x + i * kVector<T>, count - i * kVector<T>, wide);
  Group group;
#pragma unroll
  for (int j = 0; j < kGroup; ++j) group.at[j] = element<T>(words[j / kVector<T>], j % kVector<T>);
  return group;
}

/// Rounds and stores the first `count` elements.
template <class T>
__device__ inline void store_group(T* x, const Group& group, std::int64_t count, bool wide) {
  if (!wide || count < kGroup) {
#pragma unroll
    for (int j = 0; j < kGroup; ++j)
      if (j < count) x[j] = from_float<T>(group.at[j]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kGroup / kVector<T>; ++i) {
    Words words;
#pragma unroll
    for (int w = 0; w < 4; ++w)
      if constexpr (sizeof(T) == sizeof(float))
        words.at[w] = __builtin_bit_cast(std::uint32_t, group.at[i * 4 + w]);
      else
        words.at[w] = round_pair(group.at[2 * w], group.at[2 * w + 1]);
    store_words(x + i * kVector<T>, words);
  }
}

/// The calling block's threads copy n elements.
template <class T>
__device__ inline void copy_elements(T* to, const T* from, std::int64_t n) {
  const std::int64_t vectors = is_wide(to, from) ? n / kVector<T> : 0;
#pragma unroll 4
  for (std::int64_t i = threadIdx.x; i < vectors; i += blockDim.x)
    store_words(to + i * kVector<T>, load_words(from + i * kVector<T>));
  for (std::int64_t i = vectors * kVector<T> + threadIdx.x; i < n; i += blockDim.x) to[i] = from[i];
}

/// Calls fn(first, count) for the groups of n elements among `threads` threads of which this one is `thread`.
template <class Fn>
__device__ inline void for_groups(std::int64_t n, std::int64_t thread, std::int64_t threads, const Fn& fn) {
  for (std::int64_t i = thread * kGroup; i < n; i += threads * kGroup)
    fn(i, n - i < kGroup ? n - i : static_cast<std::int64_t>(kGroup));
}

}  // namespace rlhf::kernels::RLHF_GPU

#pragma once

#include <cstdint>

#include "rlhf/core/host_device.h"

namespace rlhf {

/// The upper half of a float: 8 bits of exponent, 8 of precision. Arithmetic happens in float.
struct Bfloat16 {
  std::uint16_t bits;
};

RLHF_HOST_DEVICE inline float to_float(float value) {
  return value;
}
RLHF_HOST_DEVICE inline float to_float(Bfloat16 value) {
  return __builtin_bit_cast(float, static_cast<std::uint32_t>(value.bits) << 16);
}

/// Rounds to the nearest value of T, ties to even; NaN stays NaN.
template <class T>
RLHF_HOST_DEVICE inline T from_float(float value) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return value;
  } else {
    const auto bits = __builtin_bit_cast(std::uint32_t, value);
    if (value != value) return {static_cast<std::uint16_t>((bits >> 16) | 0x40U)};
    return {static_cast<std::uint16_t>((bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16)};
  }
}

template <class T>
struct WideType {
  using Type = T;
};
template <>
struct WideType<Bfloat16> {
  using Type = float;
};
/// What sums, statistics and weight gradients of T are held in.
template <class T>
using Wide = typename WideType<T>::Type;

}  // namespace rlhf

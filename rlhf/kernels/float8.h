#pragma once

#include <cstdint>

#include "rlhf/kernels/bfloat16.h"

namespace rlhf {

/// E4M3 (OCP 8-bit Floating Point Specification 1.0): a sign, 4 bits of exponent, 3 of mantissa; +-448 at
/// most, no infinities, the smallest number above 0 is 2^-9. Arithmetic happens in float.
struct Float8 {
  std::uint8_t bits;
};
inline constexpr float kLargestFloat8 = 448;

/// The bits of a float that is 2^-120 times the number; NaN reads as +-480 * 2^-120.
/// @param code in the highest 8 bits, anything below
RLHF_HOST_DEVICE inline std::uint32_t float8_bits(std::uint32_t code) {
  return static_cast<std::uint32_t>(static_cast<std::int32_t>(code) >> 4) & 0x87F00000U;
}

RLHF_HOST_DEVICE inline float to_float(Float8 value) {
  const std::uint32_t code = value.bits;
  if ((code & 0x7FU) == 0x7FU) return __builtin_bit_cast(float, 0x7FC00000U);
  return __builtin_bit_cast(float, float8_bits(code << 24)) * 0x1p120F;
}

/// Rounds to the nearest, ties to even. NaN, and what rounds to more than 448, gives NaN.
template <>
RLHF_HOST_DEVICE inline Float8 from_float<Float8>(float value) {
  const auto bits = __builtin_bit_cast(std::uint32_t, value);
  const std::uint32_t sign = bits >> 24 & 0x80U, magnitude = bits & 0x7FFFFFFFU;
  std::uint32_t code = 0;
  if (magnitude < 0x3C800000U) {  // below 2^-6: multiples of 2^-9, which are the spacing of floats at 2^14
    code = __builtin_bit_cast(std::uint32_t, __builtin_bit_cast(float, magnitude) + 0x1p14F) - 0x46800000U;
  } else {
    code = ((magnitude + 0x7FFFFU + (magnitude >> 20 & 1U)) >> 20) - (120U << 3);
    if (code > 0x7FU) code = 0x7FU;
  }
  return {static_cast<std::uint8_t>(sign | code)};
}

/// Scale of a vector in Float8: a power of two as in E8M0 (OCP Microscaling Formats 1.0), its exponent + 127;
/// 255 is NaN. Being a power of two, it is exact where codes are read: code times scale is a bfloat16 number,
/// too. A scale with a mantissa would round no better, since codes are floating-point numbers themselves.
struct Float8Scale {
  std::uint8_t bits;
};

/// The smallest scale with which nothing is beyond 448; at least 2^-126.
/// @param largest bits of the largest magnitude; infinity and NaN give NaN
RLHF_HOST_DEVICE inline Float8Scale float8_scale(std::uint32_t largest) {
  if (largest >= 0x7F800000U) return {255};
  const std::uint32_t exponent = (largest >> 23) + ((largest & 0x7FFFFFU) > 0x600000U ? 1U : 0U);
  return {static_cast<std::uint8_t>(exponent > 9 ? exponent - 8 : 1)};  // 448 = 1.75 * 2^8
}
RLHF_HOST_DEVICE inline float scale_value(Float8Scale scale) {
  return __builtin_bit_cast(float, scale.bits == 255 ? 0x7FC00000U : std::uint32_t{scale.bits} << 23);
}
/// 1 / scale_value(scale), exactly; 0 for NaN.
RLHF_HOST_DEVICE inline float inverse_scale(Float8Scale scale) {
  return __builtin_bit_cast(float, scale.bits == 255 ? 0U : (254U - scale.bits) << 23);
}

}  // namespace rlhf

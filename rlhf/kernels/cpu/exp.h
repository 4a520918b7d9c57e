#pragma once

#include <cmath>
#include <cstdint>

namespace rlhf::kernels::RLHF_ISA {

/// exp for float in a form compilers vectorise; relative error below 2e-7 for x <= 88, 0 below -87.
inline float exp_approx(float x) {
  constexpr float kLog2e = 1.44269504088896341f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  const float clamped = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  const float shifted = clamped * kLog2e + 12582912.0f;  // adding 1.5 * 2^23 rounds to the nearest integer
  const float n = shifted - 12582912.0f;
  const float r = clamped - n * kLn2High - n * kLn2Low;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const std::int32_t bits = (static_cast<std::int32_t>(n) + 127) << 23;
  const float result = p * __builtin_bit_cast(float, bits);
  return x < -87.0f ? 0.0f : (x == x ? result : x);
}
inline double exp_approx(double x) {
  return std::exp(x);
}

/// tanh through exp; relative error below 1e-6 in float where |x| > 1e-3, absolute below 1e-7 everywhere.
template <class T>
inline T tanh_approx(T x) {
  const T e = exp_approx(-2 * (x < 0 ? -x : x));
  const T t = (1 - e) / (1 + e);
  return x < 0 ? -t : t;
}

}  // namespace rlhf::kernels::RLHF_ISA

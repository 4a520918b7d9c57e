// What a draw from a row of logits needs. Bound: arithmetic of e^x.
#include <algorithm>
#include <bit>
#include <cmath>
#include <iterator>
#include <limits>

#include "rlhf/kernels/cpu/kernels.h"

namespace rlhf::kernels::RLHF_ISA {
namespace {

constexpr std::int64_t kSums = 16;  // as many on every instruction set, so that the sums are the same
constexpr std::int64_t kBlock = 256;

constexpr float kFloor = -87.0F;  // e^-87 is the smallest normal float

// Branch-free e^x for kFloor <= x <= 0, 0 at kFloor, relative error below 2e-7: the polynomial vectorises
// where std::exp does not.
inline float weight(float x) {
  constexpr float kLog2E = 1.44269504088896341F;
  constexpr float kLn2High = 0.693145751953125F;
  constexpr float kLn2Low = 1.42860682030941723e-6F;
  constexpr float kMagic = 12582912.0F;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = x * kLog2E + kMagic;
  const float n = shifted - kMagic;
  const float r = (x - n * kLn2High) - n * kLn2Low;
  float p = 1.9875691500e-4F;
  p = p * r + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  p = p * r * r + r + 1.0F;
  const auto exponent = std::bit_cast<std::int32_t>(shifted) << 23;
  const float result = std::bit_cast<float>(std::bit_cast<std::int32_t>(p) + exponent);
  return x > kFloor ? result : 0.0F;  // of -inf 0, not e^-87
}
inline double weight(double x) {
  return std::exp(x);
}

// -inf times 0 is not a number. A NaN stays one.
template <class T>
inline T bounded(T x) {
  return std::max(x, T(kFloor));
}

}  // namespace

template <class T>
T largest(const T* x, std::int64_t n) {
  T lanes[kSums];
  std::fill(std::begin(lanes), std::end(lanes), -std::numeric_limits<T>::infinity());
  std::int64_t i = 0;
  for (; i + kSums <= n; i += kSums)
    for (std::int64_t k = 0; k < kSums; ++k) lanes[k] = std::max(lanes[k], x[i + k]);
  T most = *std::max_element(std::begin(lanes), std::end(lanes));
  for (; i < n; ++i) most = std::max(most, x[i]);
  return most;
}

template <class T>
RowWeights weigh(const T* logits, std::int64_t n, T scale, T* weights) {
  RowWeights row;
  const T most = largest(logits, n);
  row.largest = static_cast<double>(most);
  for (std::int64_t begin = 0; begin < n; begin += kBlock) {
    const std::int64_t end = std::min(begin + kBlock, n);
    T mass[kSums] = {}, moment[kSums] = {};
    std::int64_t i = begin;
    for (; i + kSums <= end; i += kSums)
#pragma omp simd
      for (std::int64_t k = 0; k < kSums; ++k) {
        const T x = bounded((logits[i + k] - most) * scale);
        const T w = weight(x);
        weights[i + k] = w;
        mass[k] += w;
        moment[k] += w * x;
      }
    for (; i < end; ++i) {
      const T x = bounded((logits[i] - most) * scale);
      weights[i] = weight(x);
      mass[0] += weights[i];
      moment[0] += weights[i] * x;
    }
    for (std::int64_t k = 0; k < kSums; ++k) {
      row.mass += static_cast<double>(mass[k]);
      row.moment += static_cast<double>(moment[k]);
    }
  }
  return row;
}

#define RLHF_INSTANTIATE(T)                   \
  template T largest(const T*, std::int64_t); \
  template RowWeights weigh(const T*, std::int64_t, T, T*);
RLHF_INSTANTIATE(float)
RLHF_INSTANTIATE(double)

}  // namespace rlhf::kernels::RLHF_ISA

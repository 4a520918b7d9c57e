// AdamW (Loshchilov & Hutter 2019) over flat buffers. Bound: memory; 4 reads and 3 writes per weight.
#include <algorithm>
#include <cmath>

#include "rlhf/kernels/adamw.h"
#include "rlhf/kernels/cpu/kernels.h"

namespace rlhf::kernels::RLHF_ISA {
namespace {

template <bool kAmsgrad, class T>
void update(const AdamwFactors& factors, double gradient_scale, const AdamwBuffers<T>& buffers) {
  const auto rate = static_cast<T>(factors.rate);
  const auto root_correction = static_cast<T>(factors.root_correction);
  const auto decay = static_cast<T>(factors.decay);
  const auto one_minus_beta1 = static_cast<T>(factors.one_minus_beta1);
  const auto beta2 = static_cast<T>(factors.beta2);
  const auto one_minus_beta2 = static_cast<T>(factors.one_minus_beta2);
  const auto epsilon = static_cast<T>(factors.epsilon);
  const auto scale = static_cast<T>(gradient_scale);
  T* const p = buffers.parameters.data();
  const T* const g = buffers.gradients.data();
  T* const m = buffers.first_moment.data();
  T* const v = buffers.second_moment.data();
  T* const largest = buffers.max_second_moment.data();
  const std::size_t count = buffers.parameters.size();
#pragma omp simd
  for (std::size_t i = 0; i < count; ++i) {
    const T gradient = g[i] * scale;
    const T first = m[i] + one_minus_beta1 * (gradient - m[i]);
    const T second = beta2 * v[i] + one_minus_beta2 * gradient * gradient;
    m[i] = first;
    v[i] = second;
    T bound = second;
    if constexpr (kAmsgrad) {
      bound = largest[i] > second ? largest[i] : second;
      largest[i] = bound;
    }
    p[i] = p[i] * decay - rate * first / (std::sqrt(bound) / root_correction + epsilon);
  }
}

}  // namespace

template <class T>
void adamw(const AdamwFactors& factors, double gradient_scale, const AdamwBuffers<T>& buffers) {
  if (buffers.max_second_moment.empty())
    update<false>(factors, gradient_scale, buffers);
  else
    update<true>(factors, gradient_scale, buffers);
}

template void adamw<float>(const AdamwFactors&, double, const AdamwBuffers<float>&);
template void adamw<double>(const AdamwFactors&, double, const AdamwBuffers<double>&);

}  // namespace rlhf::kernels::RLHF_ISA

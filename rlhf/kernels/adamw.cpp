#include "rlhf/kernels/adamw.h"

#include <algorithm>
#include <cmath>

#include "rlhf/core/error.h"

namespace rlhf {

kernels::AdamwFactors adamw_factors(const AdamwStep& step) {
  RLHF_CHECK(step.step >= 1, "adamw_update: step is ", step.step, ", expected at least 1");
  const auto steps = static_cast<double>(step.step);
  return {step.learning_rate / (1.0 - std::pow(step.beta1, steps)),
          std::sqrt(1.0 - std::pow(step.beta2, steps)),
          1.0 - step.learning_rate * step.weight_decay,
          1.0 - step.beta1,
          step.beta2,
          1.0 - step.beta2,
          step.epsilon};
}

template <class T>
void adamw_update(const AdamwStep& step, const AdamwBuffers<T>& buffers) {
  const kernels::AdamwFactors factors = adamw_factors(step);
  const std::size_t count = buffers.parameters.size();
  RLHF_CHECK(buffers.gradients.size() == count && buffers.first_moment.size() == count &&
                 buffers.second_moment.size() == count &&
                 (buffers.max_second_moment.empty() || buffers.max_second_moment.size() == count),
             "adamw_update: ", count, " parameters, but ", buffers.gradients.size(), " gradients, ",
             buffers.first_moment.size(), " first, ", buffers.second_moment.size(), " second and ",
             buffers.max_second_moment.size(), " maximal second moments");
  adamw_update(factors, step.gradient_scale, buffers);
}

template <class T>
void adamw_update(const kernels::AdamwFactors& factors, double gradient_scale,
                  const AdamwBuffers<T>& buffers) {
  const std::size_t count = buffers.parameters.size();
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
  T* const largest = buffers.max_second_moment.empty() ? nullptr : buffers.max_second_moment.data();
  if (largest == nullptr) {
#pragma GCC ivdep
    for (std::size_t i = 0; i < count; ++i) {
      const T gradient = g[i] * scale;
      m[i] += one_minus_beta1 * (gradient - m[i]);
      v[i] = beta2 * v[i] + one_minus_beta2 * gradient * gradient;
      p[i] = p[i] * decay - rate * m[i] / (std::sqrt(v[i]) / root_correction + epsilon);
    }
    return;
  }
  for (std::size_t i = 0; i < count; ++i) {
    const T gradient = g[i] * scale;
    m[i] += one_minus_beta1 * (gradient - m[i]);
    v[i] = beta2 * v[i] + one_minus_beta2 * gradient * gradient;
    largest[i] = std::max(largest[i], v[i]);
    p[i] = p[i] * decay - rate * m[i] / (std::sqrt(largest[i]) / root_correction + epsilon);
  }
}

template <class T>
double sum_of_squares(std::span<const T> values) {
  // Eight independent partial sums let the compiler vectorise and keep the order fixed.
  double partial[8] = {};
  std::size_t i = 0;
  for (; i + 8 <= values.size(); i += 8) {
    for (std::size_t k = 0; k < 8; ++k) {
      const auto x = static_cast<double>(values[i + k]);
      partial[k] += x * x;
    }
  }
  double sum = 0;
  for (const double part : partial) sum += part;
  for (; i < values.size(); ++i) sum += static_cast<double>(values[i]) * static_cast<double>(values[i]);
  return sum;
}

double clip_scale(double norm, double max_norm) {
  return max_norm > 0 ? std::min(1.0, max_norm / (norm + 1e-6)) : 1.0;
}

template void adamw_update<float>(const kernels::AdamwFactors&, double, const AdamwBuffers<float>&);
template void adamw_update<double>(const kernels::AdamwFactors&, double, const AdamwBuffers<double>&);
template void adamw_update<float>(const AdamwStep&, const AdamwBuffers<float>&);
template void adamw_update<double>(const AdamwStep&, const AdamwBuffers<double>&);
template double sum_of_squares<float>(std::span<const float>);
template double sum_of_squares<double>(std::span<const double>);

}  // namespace rlhf

#include "rlhf/train/optimizer.h"

#include <algorithm>
#include <cmath>

#include "rlhf/core/error.h"
#include "rlhf/kernels/adamw.h"

namespace rlhf {

template <class T>
Optimizer<T>::Optimizer(const OptimizerOptions& options, std::size_t num_elements)
    : options_(options), first_(num_elements), second_(num_elements) {}

template <class T>
typename Optimizer<T>::StepResult Optimizer<T>::step(const Compute<T>& compute, Parameters<T>& parameters,
                                                     double learning_rate, double gradient_scale) {
  const std::span<T> weights = parameters.trainable(), gradient = parameters.gradient();
  RLHF_CHECK(weights.size() == first_.size(), "Optimizer: made for ", first_.size(),
             " elements, the model has ", weights.size());
  StepResult result;
  result.gradient_norm = gradient_scale * std::sqrt(compute.sum_squares(
                                              gradient.data(), static_cast<std::int64_t>(gradient.size())));
  if (!std::isfinite(result.gradient_norm)) {
    result.skipped = true;
    parameters.zero_gradient();
    return result;
  }
  AdamwStep numbers;
  numbers.learning_rate = learning_rate;
  numbers.beta1 = options_.beta1;
  numbers.beta2 = options_.beta2;
  numbers.epsilon = options_.epsilon;
  numbers.weight_decay = options_.weight_decay;
  numbers.step = ++steps_;
  const kernels::AdamwFactors factors = adamw_factors(numbers);
  const double scale = gradient_scale * clip_scale(result.gradient_norm, options_.max_grad_norm);
  compute.pool().parallel_for(
      static_cast<std::int64_t>(weights.size()), 1 << 15, [&](std::int64_t b, std::int64_t e) {
        const auto part = [&](std::span<T> all) {
          return all.subspan(static_cast<std::size_t>(b), static_cast<std::size_t>(e - b));
        };
        compute.table().adamw(
            factors, scale, {part(weights), part(gradient), part(first_moment()), part(second_moment()), {}});
        std::ranges::fill(part(gradient), T(0));
      });
  return result;
}

template class Optimizer<float>;
template class Optimizer<double>;

}  // namespace rlhf

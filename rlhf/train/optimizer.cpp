#include "rlhf/train/optimizer.h"

#include <algorithm>
#include <cmath>

#include "rlhf/core/error.h"
#include "rlhf/distributed/device_collective.h"
#include "rlhf/kernels/accelerator.h"
#include "rlhf/kernels/adamw.h"

namespace rlhf {

template <class T>
Optimizer<T>::Optimizer(const OptimizerOptions& options, std::size_t num_elements, Collective& collective,
                        MomentPlacement moments)
    : options_(options),
      collective_(collective),
      num_elements_(num_elements),
      slice_(slice_of(num_elements, collective.rank(), collective.world_size())),
      moments_(moments),
      first_(slice_.size()),
      second_(slice_.size()) {}

template <class T>
typename Optimizer<T>::StepResult Optimizer<T>::step(const Compute<T>& compute, Parameters<T>& parameters,
                                                     double learning_rate, double gradient_scale) {
  RLHF_CHECK(parameters.num_trainable() == num_elements_, "Optimizer: made for ", num_elements_,
             " elements, the model has ", parameters.num_trainable());
  if constexpr (std::is_same_v<T, float>)
    if (ResidentWeights* resident = parameters.resident())
      return step_on_device(*resident, learning_rate, gradient_scale);
  const std::span<T> gradient = own_gradient(parameters), weights = slice_.of(parameters.trainable());
  double squares = compute.sum_squares(gradient.data(), static_cast<std::int64_t>(gradient.size()));
  collective_.all_reduce(std::span(&squares, 1));
  StepResult result;
  result.gradient_norm = gradient_scale * std::sqrt(squares);
  if (!std::isfinite(result.gradient_norm)) {
    result.skipped = true;
    parameters.zero_gradient();
    return result;
  }
  const kernels::AdamwFactors factors = next_factors(learning_rate);
  const double scale = gradient_scale * clip_scale(result.gradient_norm, options_.max_grad_norm);
  const std::span<T> first = first_moment(), second = second_moment();
  compute.pool().parallel_for(
      static_cast<std::int64_t>(weights.size()), 1 << 15, [&](std::int64_t b, std::int64_t e) {
        const auto part = [&](std::span<T> all) {
          return all.subspan(static_cast<std::size_t>(b), static_cast<std::size_t>(e - b));
        };
        compute.table().adamw(factors, scale, {part(weights), part(gradient), part(first), part(second), {}});
        std::ranges::fill(part(gradient), T(0));
      });
  if (collective_.world_size() == 1) return result;
  parameters.zero_gradient();
  collective_.all_gather(parameters.trainable());
  return result;
}

// This rank's slice, summed over the ranks.
template <class T>
std::span<T> Optimizer<T>::own_gradient(Parameters<T>& parameters) {
  if constexpr (std::is_same_v<T, float>)
    if (SlicedGradient* sliced = parameters.sliced_gradient()) {
      RLHF_CHECK(sliced->place() == slice_, "Optimizer: updates elements ", slice_.begin, " to ", slice_.end,
                 ", the gradient's slice is ", sliced->place().begin, " to ", sliced->place().end);
      return sliced->values();
    }
  collective_.reduce_scatter(parameters.gradient());
  return slice_.of(parameters.gradient());
}

template <class T>
kernels::AdamwFactors Optimizer<T>::next_factors(double learning_rate) {
  AdamwStep numbers;
  numbers.learning_rate = learning_rate;
  numbers.beta1 = options_.beta1;
  numbers.beta2 = options_.beta2;
  numbers.epsilon = options_.epsilon;
  numbers.weight_decay = options_.weight_decay;
  numbers.step = ++steps_;
  return adamw_factors(numbers);
}

// The norm comes to the host, which must know whether the step counts: one wait a step. With several ranks
// there is a second one, for the weights: until they are there, a rank that has gone must be noticed.
template <class T>
typename Optimizer<T>::StepResult Optimizer<T>::step_on_device(ResidentWeights& weights, double learning_rate,
                                                               double gradient_scale) {
  const Accelerator& device = weights.accelerator();
  DeviceMemory& memory = *device.memory;
  DeviceCollective* const ranks = device.ranks;
  RLHF_CHECK(weights.slice() == slice_, "Optimizer: of ", num_elements_, " weights rank ", collective_.rank(),
             " of ", collective_.world_size(), " updates ", slice_.size(), " and its accelerator has ",
             weights.slice().size(), " (Accelerator::ranks)");
  weights.weights();
  const float* const gradient = weights.own_gradient();
  if (numbers_.size() == 0) numbers_ = Buffer<double>(2 + kernels::kSumPartials, &memory);
  double *const square = numbers_.data(), *const scale = square + 1, *const partials = square + 2;
  if (moments_.on_host) stream(memory).fetch();
  device.kernels->sum_squares(square, partials, gradient, static_cast<std::int64_t>(slice_.size()),
                              memory.queue());
  if (ranks) ranks->wait();
  double squares = 0;
  memory.download(&squares, square, sizeof(squares));
  collective_.all_reduce(std::span(&squares, 1));
  StepResult result;
  result.gradient_norm = gradient_scale * std::sqrt(squares);
  result.skipped = !std::isfinite(result.gradient_norm);
  if (!result.skipped) {
    const double factor = gradient_scale * clip_scale(result.gradient_norm, options_.max_grad_norm);
    memory.upload(scale, &factor, sizeof(factor));
    update(weights, gradient, next_factors(learning_rate), scale);
    if (ranks) {
      ranks->all_gather(weights.shadow(), num_elements_, sizeof(Bfloat16));
      ranks->wait();
    }
    weights.device_written();
  }
  weights.zero_gradient();
  return result;
}

// Of this rank's slice.
template <class T>
void Optimizer<T>::update(ResidentWeights& weights, const float* gradient,
                          const kernels::AdamwFactors& factors, const double* scale) {
  DeviceMemory& memory = *weights.accelerator().memory;
  const auto update_part = [&](std::size_t begin, std::size_t count, float* first, float* second) {
    weights.accelerator().kernels->adamw(
        factors,
        {weights.master() + begin, weights.shadow() + slice_.begin + begin, gradient + begin, first, second,
         nullptr, static_cast<std::int64_t>(count), scale},
        memory.queue());
  };
  if constexpr (std::is_same_v<T, float>) {
    if (!moments_.on_host)
      return update_part(0, slice_.size(), first_.device(memory), second_.device(memory));
    stream(memory).pass(update_part);
  }
}

template <class T>
MomentStream& Optimizer<T>::stream(DeviceMemory& memory) {
  if constexpr (std::is_same_v<T, float>)
    if (!stream_) stream_.emplace(memory, first_.host(), second_.host(), moments_.piece_elements);
  return *stream_;
}

template class Optimizer<float>;
template class Optimizer<double>;

}  // namespace rlhf

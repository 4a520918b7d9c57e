#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace rlhf {

/// One AdamW step's numbers (Loshchilov & Hutter 2019, as torch.optim.AdamW).
struct AdamwStep {
  double learning_rate = 1e-3;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double epsilon = 1e-8;
  double weight_decay = 0;
  std::int64_t step = 1;      ///< 1 for the first update; drives the bias correction
  double gradient_scale = 1;  ///< factor of the gradients, such as clip_scale()
};

namespace kernels {

/// A step's numbers as the update of one element uses them.
struct AdamwFactors {
  double rate, root_correction, decay, one_minus_beta1, beta2, one_minus_beta2, epsilon;
};

/// State of one flat parameter buffer; all spans have the same length.
template <class T>
struct AdamwBuffers {
  std::span<T> parameters;
  std::span<const T> gradients;
  std::span<T> first_moment;       ///< zero before the first step
  std::span<T> second_moment;      ///< zero before the first step
  std::span<T> max_second_moment;  ///< empty unless AMSGrad is wanted; zero before the first step
};

}  // namespace kernels

/// Checks and converts a step; its gradient_scale is not part of it. @throws InvalidArgument on step < 1.
kernels::AdamwFactors adamw_factors(const AdamwStep& step);

/// Updates parameters and moments in place, in one pass. Elementwise, so a buffer may be cut anywhere and the
/// pieces updated by different threads. @throws InvalidArgument on lengths that differ or step < 1.
template <class T>
void adamw_update(const AdamwStep& step, const kernels::AdamwBuffers<T>& buffers);

/// Factor that brings a global gradient norm down to max_norm: min(1, max_norm / (norm + 1e-6)) as
/// torch.nn.utils.clip_grad_norm_; 1 when max_norm is 0 (off).
double clip_scale(double norm, double max_norm);

extern template void adamw_update<float>(const AdamwStep&, const kernels::AdamwBuffers<float>&);
extern template void adamw_update<double>(const AdamwStep&, const kernels::AdamwBuffers<double>&);

}  // namespace rlhf

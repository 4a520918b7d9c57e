#include "rlhf/kernels/adamw.h"

#include <algorithm>
#include <cmath>

#include "rlhf/core/error.h"
#include "rlhf/kernels/kernel_table.h"

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
void adamw_update(const AdamwStep& step, const kernels::AdamwBuffers<T>& buffers) {
  const kernels::AdamwFactors factors = adamw_factors(step);
  const std::size_t count = buffers.parameters.size();
  RLHF_CHECK(buffers.gradients.size() == count && buffers.first_moment.size() == count &&
                 buffers.second_moment.size() == count &&
                 (buffers.max_second_moment.empty() || buffers.max_second_moment.size() == count),
             "adamw_update: ", count, " parameters, but ", buffers.gradients.size(), " gradients, ",
             buffers.first_moment.size(), " first, ", buffers.second_moment.size(), " second and ",
             buffers.max_second_moment.size(), " maximal second moments");
  kernels::kernels_for<T>(kernels::detect_cpu_isa()).adamw(factors, step.gradient_scale, buffers);
}

double clip_scale(double norm, double max_norm) {
  return max_norm > 0 ? std::min(1.0, max_norm / (norm + 1e-6)) : 1.0;
}

template void adamw_update<float>(const AdamwStep&, const kernels::AdamwBuffers<float>&);
template void adamw_update<double>(const AdamwStep&, const kernels::AdamwBuffers<double>&);

}  // namespace rlhf

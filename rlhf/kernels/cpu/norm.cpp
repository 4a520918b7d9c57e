// RMSNorm (Zhang & Sennrich 2019) and LayerNorm with their gradients. Bound: memory.
#include <cmath>

#include "rlhf/kernels/cpu/kernels.h"

namespace rlhf::kernels::RLHF_ISA {

template <class T>
void norm(const NormArgs<T>& args, std::int64_t t0, std::int64_t t1) {
  const std::int64_t D = args.D;
  const T offset = args.plus_one ? 1 : 0;
  for (std::int64_t t = t0; t < t1; ++t) {
    const T* x = args.x + t * D;
    T* y = args.y + t * D;
    T mean = 0;
    if (args.layer_norm) {
#pragma omp simd reduction(+ : mean)
      for (std::int64_t d = 0; d < D; ++d) mean += x[d];
      mean /= static_cast<T>(D);
    }
    T square = 0;
#pragma omp simd reduction(+ : square)
    for (std::int64_t d = 0; d < D; ++d) square += (x[d] - mean) * (x[d] - mean);
    const T rstd = 1 / std::sqrt(square / static_cast<T>(D) + static_cast<T>(args.eps));
    for (std::int64_t d = 0; d < D; ++d) y[d] = (x[d] - mean) * rstd * (offset + args.weight[d]);
    if (args.bias)
      for (std::int64_t d = 0; d < D; ++d) y[d] += args.bias[d];
    if (args.rstd) args.rstd[t] = rstd;
    if (args.mean) args.mean[t] = mean;
  }
}

template <class T>
void norm_grad_input(const NormGradArgs<T>& args, std::int64_t t0, std::int64_t t1) {
  const std::int64_t D = args.D;
  const T offset = args.plus_one ? 1 : 0;
  for (std::int64_t t = t0; t < t1; ++t) {
    const T* x = args.x + t * D;
    const T* dy = args.dy + t * D;
    T* dx = args.dx + t * D;
    const T mean = args.layer_norm ? args.mean[t] : 0, rstd = args.rstd[t];
    T dot = 0, sum = 0;
#pragma omp simd reduction(+ : dot, sum)
    for (std::int64_t d = 0; d < D; ++d) {
      const T g = dy[d] * (offset + args.weight[d]);
      dot += g * (x[d] - mean) * rstd;
      sum += g;
    }
    dot /= static_cast<T>(D);
    sum = args.layer_norm ? sum / static_cast<T>(D) : 0;
    for (std::int64_t d = 0; d < D; ++d) {
      const T normalised = (x[d] - mean) * rstd;
      dx[d] += rstd * (dy[d] * (offset + args.weight[d]) - sum - normalised * dot);
    }
  }
}

template <class T>
void norm_grad_weight(const NormGradArgs<T>& args, std::int64_t d0, std::int64_t d1) {
  for (std::int64_t t = 0; t < args.T_rows; ++t) {
    const T* x = args.x + t * args.D;
    const T* dy = args.dy + t * args.D;
    const T mean = args.layer_norm ? args.mean[t] : 0, rstd = args.rstd[t];
    if (args.dweight)
      for (std::int64_t d = d0; d < d1; ++d) args.dweight[d] += dy[d] * (x[d] - mean) * rstd;
    if (args.dbias)
      for (std::int64_t d = d0; d < d1; ++d) args.dbias[d] += dy[d];
  }
}

template void norm<float>(const NormArgs<float>&, std::int64_t, std::int64_t);
template void norm<double>(const NormArgs<double>&, std::int64_t, std::int64_t);
template void norm_grad_input<float>(const NormGradArgs<float>&, std::int64_t, std::int64_t);
template void norm_grad_input<double>(const NormGradArgs<double>&, std::int64_t, std::int64_t);
template void norm_grad_weight<float>(const NormGradArgs<float>&, std::int64_t, std::int64_t);
template void norm_grad_weight<double>(const NormGradArgs<double>&, std::int64_t, std::int64_t);

}  // namespace rlhf::kernels::RLHF_ISA

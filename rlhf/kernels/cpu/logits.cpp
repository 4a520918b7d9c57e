// Log-probability and entropy of one row of logits, and their gradient. Bound: two passes over the row in
// cache.
#include <cmath>

#include "rlhf/kernels/cpu/exp.h"
#include "rlhf/kernels/cpu/kernels.h"

namespace rlhf::kernels::RLHF_ISA {
namespace {
constexpr std::int64_t kChunk = 2048;  // float partial sums this long, then double: error stays below 1e-6
}

template <class T>
LogitsRow logits_row(T* logits, std::int64_t V, double inv_temperature, double softcap, TokenId target) {
  if (softcap > 0) {
    const T cap = static_cast<T>(softcap);
#pragma omp simd
    for (std::int64_t i = 0; i < V; ++i) logits[i] = cap * tanh_approx(logits[i] / cap);
  }
  T maximum = logits[0];
#pragma omp simd reduction(max : maximum)
  for (std::int64_t i = 0; i < V; ++i) maximum = logits[i] > maximum ? logits[i] : maximum;
  const T scale = static_cast<T>(inv_temperature);
  double total = 0, weighted = 0;
  for (std::int64_t begin = 0; begin < V; begin += kChunk) {
    const std::int64_t end = begin + kChunk < V ? begin + kChunk : V;
    T sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, product)
    for (std::int64_t i = begin; i < end; ++i) {
      const T z = (logits[i] - maximum) * scale;
      const T e = exp_approx(z);
      sum += e;
      product += e * z;
    }
    total += static_cast<double>(sum);
    weighted += static_cast<double>(product);
  }
  LogitsRow row;
  row.max = static_cast<double>(maximum) * inv_temperature;
  const double log_total = std::log(total);
  row.lse = row.max + log_total;
  row.entropy = log_total - weighted / total;
  row.logprob =
      (static_cast<double>(logits[target]) - static_cast<double>(maximum)) * inv_temperature - log_total;
  return row;
}

template <class T>
void logits_row_grad(T* logits, std::int64_t V, double inv_temperature, double softcap, TokenId target,
                     const LogitsRow& row, double dlogprob, double dentropy) {
  const T scale = static_cast<T>(inv_temperature), lse = static_cast<T>(row.lse);
  const T entropy = static_cast<T>(row.entropy), dlp = static_cast<T>(dlogprob),
          dent = static_cast<T>(dentropy);
  const T target_logit = logits[target];
#pragma omp simd
  for (std::int64_t i = 0; i < V; ++i) {
    const T log_p = logits[i] * scale - lse;
    const T p = exp_approx(log_p);
    const T capped = logits[i];
    T gradient = -p * (dlp + dent * (log_p + entropy)) * scale;
    if (softcap > 0) {
      const T ratio = capped / static_cast<T>(softcap);
      gradient *= 1 - ratio * ratio;
    }
    logits[i] = gradient;
  }
  T slope = scale * dlp;
  if (softcap > 0) {
    const T ratio = target_logit / static_cast<T>(softcap);
    slope *= 1 - ratio * ratio;
  }
  logits[target] += slope;
}

#define RLHF_INSTANTIATE(T)                                                                             \
  template LogitsRow logits_row<T>(T*, std::int64_t, double, double, TokenId);                          \
  template void logits_row_grad<T>(T*, std::int64_t, double, double, TokenId, const LogitsRow&, double, \
                                   double);
RLHF_INSTANTIATE(float)
RLHF_INSTANTIATE(double)

}  // namespace rlhf::kernels::RLHF_ISA

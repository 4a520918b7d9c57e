#include "rlhf/ppo/token_distribution.h"

#include <algorithm>
#include <cmath>

#include "rlhf/core/error.h"

namespace rlhf::ppo {
namespace {

struct Normaliser {
  double inverse_temperature = 1;
  double log_sum = 0;  ///< log of the sum of exp(logits / temperature)
};

template <class T>
Normaliser normaliser_of(std::span<const T> logits, std::size_t label, double temperature) {
  RLHF_CHECK(temperature > 0, "token distribution: temperature is ", temperature, ", expected above 0");
  RLHF_CHECK(label < logits.size(), "token distribution: label ", label, " outside a vocabulary of ",
             logits.size());
  const double scale = 1.0 / temperature;
  const double largest = *std::max_element(logits.begin(), logits.end()) * scale;
  double sum = 0;
  for (const T logit : logits) sum += std::exp(logit * scale - largest);
  return {scale, largest + std::log(sum)};
}

}  // namespace

template <class T>
TokenDistribution token_distribution(std::span<const T> logits, std::size_t label, double temperature) {
  const Normaliser n = normaliser_of(logits, label, temperature);
  TokenDistribution d;
  d.log_prob = logits[label] * n.inverse_temperature - n.log_sum;
  for (const T logit : logits) {
    const double log_prob = logit * n.inverse_temperature - n.log_sum;
    const double prob = std::exp(log_prob);
    // A logit of -inf has probability 0 and adds nothing.
    if (prob > 0) d.entropy -= prob * log_prob;
    d.sum_pi_squared += prob * prob;
  }
  return d;
}

template <class T>
void add_distribution_gradient(std::span<const T> logits, std::size_t label, double temperature,
                               const DistributionGradient& scale, std::span<T> gradient) {
  RLHF_CHECK(gradient.size() == logits.size(), "token distribution: ", gradient.size(), " gradients for ",
             logits.size(), " logits");
  const Normaliser n = normaliser_of(logits, label, temperature);
  const double entropy = scale.entropy != 0 ? token_distribution(logits, label, temperature).entropy : 0.0;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    const double log_prob = logits[i] * n.inverse_temperature - n.log_sum;
    const double prob = std::exp(log_prob);
    double slope = scale.log_prob * ((i == label ? 1.0 : 0.0) - prob);
    if (prob > 0) slope -= scale.entropy * prob * (log_prob + entropy);
    gradient[i] += static_cast<T>(slope * n.inverse_temperature);
  }
}

template TokenDistribution token_distribution<float>(std::span<const float>, std::size_t, double);
template TokenDistribution token_distribution<double>(std::span<const double>, std::size_t, double);
template void add_distribution_gradient<float>(std::span<const float>, std::size_t, double,
                                               const DistributionGradient&, std::span<float>);
template void add_distribution_gradient<double>(std::span<const double>, std::size_t, double,
                                                const DistributionGradient&, std::span<double>);

}  // namespace rlhf::ppo

#pragma once

#include <cstddef>
#include <span>

namespace rlhf::ppo {

/// What the losses need to know of softmax(logits / temperature) at one position.
struct TokenDistribution {
  double log_prob = 0;        ///< of the label, nats
  double entropy = 0;         ///< nats
  double sum_pi_squared = 0;  ///< sum of squared probabilities, for the token baselines
};

/// Computes them in two passes over the vocabulary, sums in double. This is the readable reference of the
/// chunked tensor code in training. @throws InvalidArgument on a label outside the vocabulary or a
/// temperature <= 0.
template <class T>
TokenDistribution token_distribution(std::span<const T> logits, std::size_t label, double temperature);

/// Adds scale_log_prob * d log_prob / d logits + scale_entropy * d entropy / d logits (with respect to the
/// undivided logits) to `gradient`, of the same length.
struct DistributionGradient {
  double log_prob = 0;
  double entropy = 0;
};
template <class T>
void add_distribution_gradient(std::span<const T> logits, std::size_t label, double temperature,
                               const DistributionGradient& scale, std::span<T> gradient);

extern template TokenDistribution token_distribution<float>(std::span<const float>, std::size_t, double);
extern template TokenDistribution token_distribution<double>(std::span<const double>, std::size_t, double);
extern template void add_distribution_gradient<float>(std::span<const float>, std::size_t, double,
                                                      const DistributionGradient&, std::span<float>);
extern template void add_distribution_gradient<double>(std::span<const double>, std::size_t, double,
                                                       const DistributionGradient&, std::span<double>);

}  // namespace rlhf::ppo

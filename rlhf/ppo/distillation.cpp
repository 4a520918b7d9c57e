#include "rlhf/ppo/distillation.h"

#include <algorithm>
#include <cmath>

#include "rlhf/core/error.h"

namespace rlhf::ppo {
namespace {

// What is taken off value / temperature to make it a log-probability.
double log_normalizer(std::span<const float> values, double temperature) {
  const double largest = static_cast<double>(*std::ranges::max_element(values)) / temperature;
  double sum = 0;
  for (const float value : values) sum += std::exp(static_cast<double>(value) / temperature - largest);
  return largest + std::log(sum);
}

}  // namespace

double reverse_kl(std::span<const float> log_p, std::span<const float> log_q, double temperature,
                  double scale, std::span<float> gradient) {
  RLHF_CHECK(!log_p.empty() && log_q.size() == log_p.size(), "reverse KL: ", log_p.size(),
             " probabilities of the policy and ", log_q.size(), " of the teacher");
  RLHF_CHECK(gradient.empty() || gradient.size() == log_p.size(), "reverse KL: room for ", gradient.size(),
             " slopes, needed ", log_p.size());
  RLHF_CHECK(temperature > 0, "reverse KL: the temperature is ", temperature);
  const double p_total = log_normalizer(log_p, temperature), q_total = log_normalizer(log_q, temperature);
  const auto policy = [&](std::size_t k) { return static_cast<double>(log_p[k]) / temperature - p_total; };
  const auto gap = [&](std::size_t k) {
    return policy(k) - (static_cast<double>(log_q[k]) / temperature - q_total);
  };
  double kl = 0;
  for (std::size_t k = 0; k < log_p.size(); ++k) {
    // A token that the policy never takes adds nothing, also where the teacher never takes it either.
    const double p = std::exp(policy(k));
    if (p > 0) kl += p * gap(k);
  }
  for (std::size_t k = 0; k < gradient.size(); ++k) {
    const double p = std::exp(policy(k));
    gradient[k] = static_cast<float>(p > 0 ? scale * p * (gap(k) - kl) / temperature : 0.0);
  }
  return kl;
}

}  // namespace rlhf::ppo

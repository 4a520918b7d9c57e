#pragma once

#include <span>

namespace rlhf::ppo {

/// Reverse KL(pi || q) of a policy to a teacher at one position, both at a temperature, in nats; sums in
/// double.
/// @param log_p, log_q log-probabilities [V] at temperature 1
/// @param scale factor of the gradient
/// @param gradient [V]: set to scale * d KL / d logits of the policy (before the division by the
/// temperature), which is pi_k (log pi_k - log q_k - KL) / temperature. May be empty.
/// @throws InvalidArgument on sizes that do not fit or a temperature <= 0
double reverse_kl(std::span<const float> log_p, std::span<const float> log_q, double temperature,
                  double scale, std::span<float> gradient);

}  // namespace rlhf::ppo

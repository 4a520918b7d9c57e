#pragma once

#include <span>
#include <vector>

#include "rlhf/model/decoder.h"

namespace rlhf {

/// A prompt with its response, for a forward pass over both.
struct ScoredText {
  std::vector<TokenId> tokens;     ///< prompt and response
  std::vector<std::uint8_t> mask;  ///< per token; 1 = the policy chose it
};

/// For each text the sum over its chosen tokens of KL(policy(. | tokens before) || reference(. | tokens
/// before)), in nats: exact over the vocabulary at temperature 1, where an estimate from the chosen tokens
/// alone would be noise. The two models have one configuration. At most `max_tokens_per_pass` tokens are in a
/// pass, common heads counted once.
std::vector<double> policy_kl(const ModelConfig& config, const DecoderWeights<float>& policy,
                              const DecoderWeights<float>& reference, const std::vector<ScoredText>& texts,
                              std::int64_t max_tokens_per_pass, Compute<float> compute);

}  // namespace rlhf

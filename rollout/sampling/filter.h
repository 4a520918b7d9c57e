#pragma once

#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

#include "rlhf/core/ids.h"
#include "rollout/sampling/options.h"

namespace rlhf {

/// Tokens that were there before the one to be drawn.
struct SamplingHistory {
  std::span<const TokenId> context;    ///< prompt and response so far: what the repetition penalty looks at
  std::span<const TokenId> generated;  ///< response so far: what presence and frequency penalty look at
  const std::unordered_map<TokenId, float>* logit_bias = nullptr;  ///< added to the logits; may be null
};

/// Applies bias and penalties to a row of logits in place. Each distinct token is changed once, however often
/// it occurred (the frequency penalty counts). @throws InvalidArgument on a token outside the vocabulary.
void apply_penalties(const SamplingOptions& options, const SamplingHistory& history, std::span<float> logits);

/// A token that the filters kept. `logit` is after temperature.
struct KeptToken {
  TokenId token = 0;
  float logit = 0;
};

/// Divides the logits by the temperature in place (greedy and 1 change nothing).
void apply_temperature(const SamplingOptions& options, std::span<float> logits);

/// Returns the tokens that top-k, top-p and min-p keep of a row of logits after temperature, in ascending
/// token order. Never sorts the vocabulary: partial selection for top-k and top-p, one scan for min-p. Logits
/// of -inf are never kept. @throws InvalidArgument when every logit is -inf or one is NaN.
std::vector<KeptToken> filter_tokens(const SamplingOptions& options, std::span<const float> logits);

}  // namespace rlhf

#pragma once

#include <span>
#include <vector>

#include "rlhf/data/sample.h"
#include "rlhf/kernels/kernel_table.h"
#include "rollout/engine/generation.h"
#include "rollout/sampling/token_trie.h"

namespace rlhf {

/// What a draw depends on, besides the row of logits.
struct DrawContext {
  const GenerationRequest& request;
  std::uint32_t sample_index = 0;
  std::span<const TokenId> tokens;     ///< prompt and response so far
  std::span<const TokenId> generated;  ///< the response alone
  const TokenTrie* choices = nullptr;  ///< of the request; null = any response
  TokenTrie::Node node = TokenTrie::kRoot;
};

/// A token and everything a sample may record about it.
struct DrawnToken {
  TokenId token = 0;
  float log_prob = 0;  ///< under exactly the distribution drawn from; NaN: the row cannot be drawn from
  float raw_log_prob = 0, entropy = 0;
  std::vector<TokenLogProb> top;
};

/// Which tokens a request's constraints leave at a draw.
struct TokenLimits {
  std::span<const TokenId> allowed;    ///< only these; empty = all
  std::span<const TokenId> forbidden;  ///< and none of these
};
/// @param scratch holds a list that the request does not have as one
TokenLimits limits_of(const DrawContext& context, std::vector<TokenId>& scratch);

/// Whether kernels can make this draw: without a list of alternatives, and with filters that keep no least
/// number of tokens above 1.
bool draws_on_device(const DrawContext& context);

/// Draws the next token from its row of logits [V], after the model's soft cap. A pure function of its
/// arguments: the draw's counter is (seed, prompt id, sample index, length of the response). Thread-safe.
DrawnToken draw_token(const kernels::Kernels<float>& kernels, const DrawContext& context,
                      std::span<float> logits);

}  // namespace rlhf

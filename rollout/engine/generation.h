#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "rlhf/core/ids.h"
#include "rlhf/data/sample.h"
#include "rollout/engine/turns.h"
#include "rollout/sampling/options.h"

namespace rlhf {

/// When a response ends, besides reaching the model's context.
struct StopOptions {
  std::vector<TokenId> tokens;       ///< end the response and are part of it (EOS)
  std::vector<std::string> strings;  ///< end the response when its text contains one; the text keeps it
  std::int64_t min_new_tokens = 0;   ///< stop tokens have probability 0 before this many tokens
  std::int64_t max_new_tokens = 64;  ///< at least 1; forced tokens count
  /// >= 0: the last token is this one, whatever the policy says (benchmarks with recorded lengths).
  TokenId forced_last = -1;
};

/// What a response may consist of, besides what the sampling options keep. Log-probs are those of the
/// distribution that remains.
struct ConstraintOptions {
  std::unordered_map<TokenId, float> logit_bias;  ///< added to the logits before everything else
  std::vector<TokenId> allowed_tokens;            ///< only these are drawn; empty = all
  /// The response is one of these sequences; empty = any. It ends where a sequence ends that is not the
  /// beginning of another one; where one is, a stop token decides between ending and going on.
  std::vector<std::vector<TokenId>> choices;
};

/// When a request is dropped, counted from its submission; 0 = never. Its samples then come back as far as
/// they are, with FinishReason::kDeadline.
struct DeadlineOptions {
  std::int64_t steps = 0;  ///< engine steps it may take part in
  double seconds = 0;      ///< on the engine's clock, looked at when a step begins
};

/// What a sample records beside tokens and behaviour log-probs.
struct OutputOptions {
  bool raw_logprobs = false;
  bool entropies = false;
  std::int64_t top_logprobs = 0;  ///< so many most probable tokens at each position
};

/// One prompt to be answered `num_samples` times.
struct GenerationRequest {
  PromptId prompt_id = 0;
  std::vector<TokenId> prompt;  ///< at least one token
  std::uint32_t num_samples = 1;
  std::uint32_t first_sample_index = 0;
  std::uint64_t tag = 0;   ///< handed on to the samples
  std::uint64_t seed = 0;  ///< draws are a function of (seed, prompt_id, sample index, position)
  SamplingOptions sampling;
  ConstraintOptions constraint;
  StopOptions stop;
  std::shared_ptr<TurnHandler> turns;  ///< answers the response's turns; null = a response is one turn
  int priority = 0;  ///< higher goes first, -1000 to 1000; waiting makes up for it (ageing_steps)
  DeadlineOptions deadline;
  OutputOptions output;
};

/// What the engine has done since it was made.
struct GenerationStatistics {
  std::int64_t steps = 0, prefill_tokens = 0, decode_tokens = 0;
  std::int64_t cached_prefix_tokens = 0;  ///< found in the cache instead of being prefilled
  std::int64_t preemptions = 0, recomputed_tokens = 0;
  std::int64_t draft_tokens = 0, accepted_drafts = 0;  ///< guessed and computed; of these, right
  double seconds = 0;
  double decode_only_seconds = 0;  ///< steps without prefill
  std::int64_t decode_only_tokens = 0;
  double matmul_flops = 0;  ///< as DecoderRunner::matmul_flops
};

}  // namespace rlhf

#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "rlhf/core/ids.h"
#include "rlhf/data/sample.h"
#include "rollout/sampling/options.h"

namespace rlhf {

/// A tool the policy can call inside a response: when the response ends with `trigger`, `respond` gets the
/// text so far and returns tokens that are written into the context. They are part of the sample with mask 0.
struct ToolCall {
  std::string trigger;                                                 ///< e.g. "</calc>"; empty = no tool
  std::function<std::vector<TokenId>(std::string_view text)> respond;  ///< must not throw for malformed calls
  int max_calls = 4;                                                   ///< further triggers are plain text
};

/// When a response ends, besides reaching the model's context.
struct StopOptions {
  std::vector<TokenId> tokens;       ///< end the response and are part of it (EOS)
  std::vector<std::string> strings;  ///< end the response when its text contains one; the text keeps it
  std::int64_t min_new_tokens = 0;   ///< stop tokens have probability 0 before this many tokens
  std::int64_t max_new_tokens = 64;  ///< at least 1; forced tokens count
  /// >= 0: the last token is this one, whatever the policy says (benchmarks with recorded lengths).
  TokenId forced_last = -1;
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
  StopOptions stop;
  ToolCall tool;
};

/// What the engine has done since it was made.
struct GenerationStatistics {
  std::int64_t steps = 0, prefill_tokens = 0, decode_tokens = 0, cached_prefix_tokens = 0;
  double seconds = 0;
  double decode_only_seconds = 0;  ///< steps without prefill
  std::int64_t decode_only_tokens = 0;
};

}  // namespace rlhf

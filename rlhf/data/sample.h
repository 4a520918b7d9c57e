#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "rlhf/core/ids.h"

namespace rlhf {

/// What a policy is asked. `reference` is whatever the task's reward needs (a gold answer, a shortest path
/// ...), as the text of one JSON value, so that this struct stays free of any task.
struct Prompt {
  PromptId id = 0;
  std::vector<TokenId> tokens;
  std::string text;                     ///< the rendered text behind `tokens`; for logs and rules
  std::string task;                     ///< task kind, e.g. "intent"; rewards and reports group by it
  std::string reference;                ///< JSON text; empty when the task needs none
  std::vector<std::string> user_turns;  ///< what a scripted user says after the policy's turns
};

/// Why a response ended.
enum class FinishReason {
  kStop,
  kLength,
  kStopString,
  kCancelled,
  kDeadline,          ///< of the request, or the episode's or its environment's time was up
  kTurns,             ///< the environment would have gone on, the limit on turns did not let it
  kEnvironmentError,  ///< the environment threw
};
/// Returns "stop", "length", "stop_string", "cancelled", "deadline", "turns" or "environment_error".
const char* to_string(FinishReason reason);
/// Whether a limit or an error ended a response, not the policy or its environment.
bool is_cut_short(FinishReason reason);

/// One turn of a policy that an environment has answered, in a response of several turns.
struct SampleTurn {
  std::int64_t end = 0;                          ///< tokens of the response up to and including the turn
  double reward = 0;                             ///< what the environment gave for it
  std::int32_t tool_calls = 0, tool_errors = 0;  ///< calls, and how many of them ended in an error text
  double seconds = 0;                            ///< that the environment took
};

/// A token that might have been drawn, with its log-prob.
struct TokenLogProb {
  TokenId token = 0;
  float log_prob = 0;
};

/// One response of a policy to one prompt. All per-token vectors have the length of `tokens`.
struct Sample {
  PromptId prompt_id = 0;
  std::uint64_t tag = 0;                       ///< of the request
  std::uint32_t sample_index = 0;              ///< 0 .. samples_per_prompt - 1
  std::vector<TokenId> tokens;                 ///< response, including the EOS token when it was sampled
  std::vector<float> logprobs;                 ///< behaviour log-probs under exactly the sampled distribution
  std::vector<WeightVersion> weight_versions;  ///< weights that produced each token
  std::vector<std::uint8_t> mask;              ///< 1 = chosen by the policy, 0 = forced (an observation)
  FinishReason finish_reason = FinishReason::kLength;
  std::vector<SampleTurn> turns;  ///< that an environment has answered; empty without one
  std::string environment_error;  ///< what was thrown, with FinishReason::kEnvironmentError
  std::size_t answer_begin = 0;   ///< first token of the last turn; 0 = the whole response is one answer
  /// [prompt and response but the last token, width] behind the first RolloutEngineOptions::trunk_layers
  /// layers. Empty when the engine keeps none, or the blocks were gone when an environment ended the
  /// response.
  std::vector<float> trunk;
  // Only when the request asked for them (OutputOptions); forced tokens have 0 and no entry.
  std::vector<float>
      raw_logprobs;              ///< under softmax(logits / temperature) of the model, before everything else
  std::vector<float> entropies;  ///< of the distribution drawn from, nats
  std::vector<std::vector<TokenLogProb>> top_logprobs;  ///< most probable first, as raw_logprobs
};

}  // namespace rlhf

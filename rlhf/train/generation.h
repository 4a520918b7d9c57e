#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "rlhf/train/language_model.h"
#include "rlhf/train/task_data.h"
#include "rollout/engine/rollout_engine.h"

namespace rlhf {

/// How responses are sampled, in training and in evaluation.
struct RolloutOptions {
  SamplingOptions sampling;
  std::int64_t max_new_tokens = 64;
  std::vector<std::string> stop_strings;
  std::int64_t max_sequences = 32;         ///< samples that decode at once
  std::int64_t max_tokens_per_step = 512;  ///< decode tokens and prefill chunk of one engine step
  std::int64_t draft_rows = 0;             ///< see RolloutEngineOptions::max_draft_rows

  template <class V>
  void visit_fields(V& v) {
    v.group("sampling", sampling, "Distribution that tokens are drawn from");
    v.field("max_new_tokens", max_new_tokens, "Longest response in tokens", {1, 1 << 20});
    v.field("stop_strings", stop_strings, "Texts that end a response");
    v.field("max_sequences", max_sequences, "Samples that decode at once", {1, 4096});
    v.field("max_tokens_per_step", max_tokens_per_step, "Decode tokens and prefill chunk of one engine step",
            {1, 1 << 20});
    v.field("draft_rows", draft_rows,
            "Where so few samples decode, guess coming tokens up to so many rows a step. Samples stay the same, but a "
            "resumed run may finish them in another order and differ in the last bits; 0 = off",
            {0, 4096});
  }
};

/// One prompt's request with the run's sampling, stop tokens and the task's tool.
GenerationRequest make_request(const Prompt& prompt, const RolloutOptions& rollout,
                               const LanguageModel& model, const TaskData& data);
/// An engine whose cache holds `max_sequences` samples of the longest prompt and response.
/// @param trunk_layers see RolloutEngineOptions
std::unique_ptr<RolloutEngine> make_engine(const LanguageModel& model, const RolloutOptions& rollout,
                                           const std::vector<Prompt>& prompts, const Compute<float>& compute,
                                           std::int64_t trunk_layers = 0);
/// Runs all requests to the end. Samples are ordered by (request, sample index).
std::vector<Sample> generate_all(RolloutEngine& engine, const DecoderWeights<float>& weights,
                                 WeightVersion version, std::vector<GenerationRequest> requests);
/// Decoded response without special tokens.
std::string response_text(const LanguageModel& model, const Sample& sample);

}  // namespace rlhf

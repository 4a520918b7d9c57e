#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "rlhf/distributed/collective.h"
#include "rlhf/kernels/kv_format.h"
#include "rlhf/model/rollout_weights.h"
#include "rlhf/train/environment_options.h"
#include "rlhf/train/language_model.h"
#include "rlhf/train/task_data.h"
#include "rollout/engine/rollout_engine.h"

namespace rlhf {

/// How responses are sampled, in training and in evaluation.
struct RolloutOptions {
  SamplingOptions sampling;
  std::int64_t max_new_tokens = 64;
  std::vector<std::string> stop_strings;
  std::int64_t max_sequences = 32;             ///< samples that decode at once
  std::int64_t max_tokens_per_step = 0;        ///< see step_tokens
  std::int64_t draft_rows = 0;                 ///< see RolloutEngineOptions::max_draft_rows
  WeightFormat weights = WeightFormat::kFp32;  ///< what training samples are drawn with; evaluation is fp32
  KvFormat kv_dtype = KvFormat::kAuto;         ///< of K and V of training samples; see visit_fields
  std::optional<EnvironmentOptions> environment;  ///< answers the turns of responses to prompts of files
  Decoding decoding = Decoding::kPaged;           ///< the others for comparisons; no option of a run

  template <class V>
  void visit_fields(V& v) {
    v.group("sampling", sampling, "Distribution that tokens are drawn from");
    v.field("max_new_tokens", max_new_tokens, "Longest response in tokens", {1, 1 << 20});
    v.field("stop_strings", stop_strings, "Texts that end a response");
    v.field("max_sequences", max_sequences, "Samples that decode at once", {1, 4096});
    v.field("max_tokens_per_step", max_tokens_per_step,
            "Decode tokens and prefill chunk of one engine step; 0 = 512, on a GPU 4096", {0, 1 << 20});
    v.field("draft_rows", draft_rows,
            "Where so few samples decode, guess coming tokens up to so many rows a step. Samples stay the "
            "same, but a "
            "resumed run may finish them in another order and differ in the last bits; 0 = off",
            {0, 4096});
    v.choice(
        "weights", weights,
        {{"fp32", WeightFormat::kFp32}, {"bf16", WeightFormat::kBf16}, {"int8", WeightFormat::kInt8}},
        "How training samples' weights are stored for decoding. With bf16 or int8 the trainer computes old "
        "log-probs itself and ppo.weight_mismatch says what is done about the difference. Evaluation "
        "decodes fp32");
    v.choice(
        "kv_dtype", kv_dtype, {{"auto", KvFormat::kAuto}, {"fp8", KvFormat::kFp8}},
        "How training samples' K and V are kept: auto as they are computed, bf16 on a GPU; fp8 (E4M3 with "
        "a scale for each token and head, on a GPU only) takes half of that. With fp8 samples are "
        "rounded, as with rollout.weights: bf16. Evaluation keeps bf16");
    v.group(
        "environment", environment,
        "Tools or a user that answer a response's turns, on data.source: files; max_new_tokens then counts "
        "the tokens of a whole episode");
  }
  /// Whether training samples come from more rounded numbers than the trainer computes with.
  bool is_rounded() const { return weights != WeightFormat::kFp32 || kv_dtype != KvFormat::kAuto; }
  /// What makes them so: "rollout.weights is int8".
  std::string rounding_text() const;
};

/// One prompt's request with the run's sampling, stop tokens and the task's tool.
GenerationRequest make_request(const Prompt& prompt, const RolloutOptions& rollout,
                               const LanguageModel& model, const TaskData& data);
/// K/V blocks of a generator: to hold `max_sequences` samples of the longest prompt and response, and the
/// least with which it can answer every prompt.
struct BlockNeed {
  std::int64_t minimum = 0, wanted = 0;
};
BlockNeed block_need(const RolloutOptions& rollout, std::int64_t longest_prompt);
/// Tokens of the longest of some prompts, at least 1.
std::int64_t longest_prompt(const std::vector<Prompt>& prompts);

/// What an engine is made for, beside the model.
struct EngineSetting {
  const RolloutOptions& rollout;
  const std::vector<Prompt>& prompts;
  Compute<float> compute;
  /// Most K/V blocks in the rollout's kv_dtype, if it wants more; as many bytes in another.
  std::int64_t max_blocks = std::numeric_limits<std::int64_t>::max();
  std::int64_t trunk_layers = 0;  ///< see RolloutEngineOptions
  Arena* arena = nullptr;         ///< see RolloutEngineOptions
  KvFormat kv = KvFormat::kAuto;  ///< see RolloutEngineOptions
};
/// An engine with the K/V blocks it wants, or as many as it may have; samples are the same. @throws
/// MemoryError when these are fewer than it needs.
std::unique_ptr<RolloutEngine> make_engine(const LanguageModel& model, const EngineSetting& setting);
/// Runs all requests to the end. Samples are ordered by (request, sample index).
std::vector<Sample> generate_all(RolloutEngine& engine, const DecoderWeights<float>& weights,
                                 WeightVersion version, std::vector<GenerationRequest> requests);
/// The same with the requests shared out over ranks, each to one; every rank gets all samples.
std::vector<Sample> generate_all(Collective& collective, RolloutEngine& engine,
                                 const DecoderWeights<float>& weights, WeightVersion version,
                                 std::vector<GenerationRequest> requests);
/// Decoded response without special tokens, results inside it included; of an episode of several turns, the
/// last one.
std::string response_text(const LanguageModel& model, const Sample& sample);
/// All turns of an episode and what was said between them, special tokens included.
std::string episode_text(const LanguageModel& model, const Sample& sample);

}  // namespace rlhf

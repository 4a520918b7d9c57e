#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "rlhf/train/task_data.h"

namespace rlhf {

/// One response sampled for training, and what its judges said.
struct SampledResponse {
  const Prompt* prompt = nullptr;
  Sample sample;
  std::string text;             ///< response_text; empty when the model has no tokenizer
  std::string episode;          ///< episode_text, where an environment has opened further turns
  std::vector<TokenId> tokens;  ///< prompt and response
  PendingScore pending;         ///< what the rules have begun
  bool judged = false;          ///< rule_score is there
  Score rule_score;
  double model_score = 0;             ///< of the reward model, when there is one
  std::vector<double> model_outputs;  ///< [positions][objectives] that made it; empty without one
};

/// Who judges the responses of a stage: the rules of the task and, with a weight, a reward model.
struct Judges {
  const TaskData& data;
  const Parameters<float>* reward_model = nullptr;
  double reward_model_weight = 0;

  /// @throws InvalidArgument when `stage` has no judge, or its weight is for a model that is not there
  void check(const std::string& stage) const;
  /// Begins the rules that wait for something, for a response that is complete.
  void begin(SampledResponse& response) const;
  /// Scores a response by the rules, once, with the weights of an iteration counted from 1.
  void judge_by_rules(SampledResponse& response, std::int64_t iteration) const;
};

/// A sample as an answer to `prompt`, not judged yet.
SampledResponse make_sampled_response(const LanguageModel& model, const Prompt& prompt, Sample sample);
/// A response as one JSON object, for the samples of a run directory. `score` is what the stage made of the
/// judges' scores.
std::string to_json_line(const SampledResponse& response, std::int64_t iteration, double score,
                         const Judges& judges);

}  // namespace rlhf

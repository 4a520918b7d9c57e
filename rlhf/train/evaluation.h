#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "rlhf/report/interval.h"
#include "rlhf/train/generation.h"
#include "rlhf/train/stage.h"

namespace rlhf {

/// One judged response.
struct JudgedResponse {
  const Prompt* prompt = nullptr;
  std::string text;
  double score = 0;                   ///< rule reward
  std::optional<double> model_score;  ///< of the reward model, when there is one
  std::optional<double> kl;           ///< policy_kl against the policy before PPO
  std::optional<bool> well_formed;    ///< when the task has a form
  bool ended = false;                 ///< with an end token
  std::vector<TokenId> tokens;
  std::vector<std::uint8_t> mask;  ///< per token, 1 = chosen by the policy; empty in one that was read back
};

/// Scores of one model on one task.
struct TaskScore {
  std::string task;
  std::int64_t count = 0;
  double score = 0;
  Interval interval;    ///< 95 %, of the mean
  double accuracy = 0;  ///< share of responses with full reward (1)
  std::optional<double> well_formed_rate, model_score, kl;
  double eos_rate = 0, mean_length = 0;
};

struct Evaluation {
  std::string name;  ///< "base", "sft", "ppo"
  std::vector<TaskScore> tasks;
  std::vector<JudgedResponse> responses;  ///< in the order of the prompts
  double seconds = 0;
};

/// How much a model is asked.
struct EvaluationSize {
  std::int64_t cases_per_task = 0;  ///< the first so many held-out prompts of each task; 0 = all
  std::uint32_t draws = 1;          ///< answers to a prompt
};

/// Answers held-out prompts and judges the answers by rules.
Evaluation evaluate(const std::string& name, const LanguageModel& model, const TaskData& data,
                    const RolloutOptions& rollout, const EvaluationSize& size, const StageContext& context);

/// Adds the scores that `reading` makes of a reward model's outputs for the first `cases_per_task` responses
/// of each task (0 = all).
void add_model_scores(Evaluation& evaluation, const Parameters<float>& reward_model,
                      const RewardReading& reading, std::int64_t cases_per_task, const StageContext& context);

/// Adds the KL of `policy`, which gave the responses, to `reference` for the first `cases_per_task` responses
/// of each task (0 = all).
void add_kl(Evaluation& evaluation, const Parameters<float>& policy, const Parameters<float>& reference,
            std::int64_t cases_per_task, const StageContext& context);

/// Mean score of a constant answer on the held-out prompts of a task.
double score_constant_answer(const TaskData& data, const TaskBaseline& baseline, const LanguageModel& model);

/// Scores of one task on the prompts that both models answered, in the order of the prompts.
struct PairedScores {
  std::vector<double> before, after;
  double mean_difference() const;  ///< 0 without common prompts
};
PairedScores paired_scores(const Evaluation& before, const Evaluation& after, const std::string& task);
/// Mean score over all responses.
double mean_score(const Evaluation& evaluation);

/// Keeps the judged responses as JSONL, and reads them back for a resumed run. @throws IoError
void save_evaluation(const std::filesystem::path& path, const Evaluation& evaluation);
Evaluation load_evaluation(const std::filesystem::path& path, const std::string& name, const TaskData& data,
                           std::int64_t cases_per_task);

}  // namespace rlhf

#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "reward/scoring/composition.h"
#include "rlhf/data/sample.h"
#include "rlhf/train/language_model.h"
#include "rlhf/train/reward_reading.h"
#include "rollout/environment/episode_runner.h"

namespace rlhf {

/// A tokenised demonstration. Loss is taken on tokens whose mask is 1.
struct TrainingExample {
  std::vector<TokenId> tokens;
  std::vector<std::uint8_t> loss_mask;
};

/// A tokenised comparison. Reward models read their scores at the last token; preference losses take the
/// log-probs of the tokens whose mask is 1.
struct TrainingPair {
  TrainingExample chosen, rejected;
  double margin = 0;
  std::string task;
};

/// A tokenised response marked good or bad by itself.
struct LabelledExample {
  TrainingExample example;
  bool desirable = true;
};

/// A tokenised answer with the numbers that a reward model learns to predict.
struct RatedExample {
  TrainingExample example;
  std::vector<std::size_t> positions;  ///< tokens whose outputs are compared
  std::vector<double> targets;         ///< [positions][objectives]
};

/// A constant answer per task, for the report.
struct TaskBaseline {
  std::string task, name, answer;
};

/// All data of a run, tokenised, and how responses are judged and stopped.
struct TaskData {
  std::vector<TrainingExample> demonstrations;
  std::vector<TrainingPair> train_pairs, held_out_pairs;
  std::vector<LabelledExample> labelled;  ///< for unpaired preference losses; empty: the sides of the pairs
  std::vector<RatedExample> train_ratings, held_out_ratings;
  std::vector<Prompt> train_prompts, eval_prompts;
  std::vector<TaskBaseline> baselines;
  RewardComposition rules;       ///< rule rewards; may be empty
  RewardReading reward_reading;  ///< how a reward model's outputs become a score
  /// By task; what is under "" serves tasks without an entry of their own.
  std::map<std::string, std::shared_ptr<const EpisodeRunner>> environments;
  /// Whether a response has the form its task asks for; empty when tasks have none.
  std::function<bool(const Prompt&, std::string_view)> is_well_formed;

  std::vector<std::string> warnings;

  /// What answers the turns of a task's responses; null where a response is one turn.
  const EpisodeRunner* environment(const std::string& task) const;
};

}  // namespace rlhf

#pragma once

#include <memory>

#include "rlhf/model/sequence_pass.h"
#include "rlhf/ppo/preference_loss.h"
#include "rlhf/train/optimizer.h"
#include "rlhf/train/stage.h"
#include "rlhf/train/task_data.h"

namespace rlhf {

/// Training of a reward model, on pairs or on ratings.
struct RewardModelOptions {
  double epochs = 1;
  std::int64_t max_steps = 0;        ///< optimizer steps; 0 = as epochs says
  std::int64_t pairs_per_step = 16;  ///< or rated answers
  std::int64_t max_tokens_per_micro_batch = 2048;
  RewardReadingOptions reading;
  ppo::RewardModelLossOptions loss;
  OptimizerOptions optimizer;

  template <class V>
  void visit_fields(V& v) {
    v.field("epochs", epochs, "Passes over the pairs; used when max_steps is 0", {0, 1000});
    v.field("max_steps", max_steps, "Optimizer steps; 0 = as epochs says", {0, 1e9});
    v.field("pairs_per_step", pairs_per_step, "Pairs (or rated answers) per optimizer step", {1, 1e6});
    v.field("max_tokens_per_micro_batch", max_tokens_per_micro_batch, "Tokens per forward/backward pass",
            {2, 1e7});
    reading.visit_fields(v);
    loss.visit_fields(v);
    v.group("optimizer", optimizer, "AdamW");
  }
  void validate(config::Problems& problems) const { reading.validate(problems); }
};

/// How well a reward model orders held-out pairs.
struct PairAccuracy {
  std::int64_t pairs = 0;
  double accuracy = 0;           ///< share with score(chosen) > score(rejected)
  double calibration_error = 0;  ///< expected calibration error over 10 bins of sigmoid(margin)
  double mean_margin = 0;
};

/// Accuracy of the scores that `reading` makes of the model's outputs.
PairAccuracy evaluate_pairs(SequencePass<float>& pass, const DecoderWeights<float>& weights,
                            const RewardReading& reading, const std::vector<TrainingPair>& pairs);

/// Trains `reward` (a scalar-head model) on pairs with ppo::reward_model_loss (Bradley & Terry 1952; Stiennon
/// et al. 2020).
void run_reward_model(Parameters<float>& reward, const std::vector<TrainingPair>& train,
                      const RewardModelOptions& options, const StageContext& context);

}  // namespace rlhf

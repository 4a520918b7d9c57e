#pragma once

#include <memory>

#include "rlhf/model/sequence_pass.h"
#include "rlhf/ppo/preference_loss.h"
#include "rlhf/train/optimizer.h"
#include "rlhf/train/stage.h"
#include "rlhf/train/task_data.h"

namespace rlhf {

/// Training of a Bradley-Terry reward model.
struct RewardModelOptions {
  double epochs = 1;
  std::int64_t max_steps = 0;  ///< optimizer steps; 0 = as epochs says
  std::int64_t pairs_per_step = 16;
  std::int64_t max_tokens_per_micro_batch = 2048;
  ppo::RewardModelLossOptions loss;
  OptimizerOptions optimizer;

  template <class V>
  void visit_fields(V& v) {
    v.field("epochs", epochs, "Passes over the pairs; used when max_steps is 0", {0, 1000});
    v.field("max_steps", max_steps, "Optimizer steps; 0 = as epochs says", {0, 1e9});
    v.field("pairs_per_step", pairs_per_step, "Pairs per optimizer step", {1, 1e6});
    v.field("max_tokens_per_micro_batch", max_tokens_per_micro_batch, "Tokens per forward/backward pass",
            {2, 1e7});
    loss.visit_fields(v);
    v.group("optimizer", optimizer, "AdamW");
  }
};

/// How well a reward model orders held-out pairs.
struct PairAccuracy {
  std::int64_t pairs = 0;
  double accuracy = 0;           ///< share with score(chosen) > score(rejected)
  double calibration_error = 0;  ///< expected calibration error over 10 bins of sigmoid(margin)
  double mean_margin = 0;
};

/// Scalar scores of whole sequences, read at the last token. The trunk that the model shares is not special
/// here.
std::vector<double> score_sequences(SequencePass<float>& pass, const DecoderWeights<float>& weights,
                                    const std::vector<std::span<const TokenId>>& sequences,
                                    std::int64_t max_tokens_per_pass);
PairAccuracy evaluate_pairs(SequencePass<float>& pass, const DecoderWeights<float>& weights,
                            const std::vector<TrainingPair>& pairs);

/// Trains `reward` (a scalar-head model) on pairs with ppo::reward_model_loss (Bradley & Terry 1952; Stiennon
/// et al. 2020).
/// @return accuracy on `held_out` (empty: zeros)
PairAccuracy run_reward_model(Parameters<float>& reward, const std::vector<TrainingPair>& train,
                              const std::vector<TrainingPair>& held_out, const RewardModelOptions& options,
                              const StageContext& context);

}  // namespace rlhf

#pragma once

#include "rlhf/ppo/reward_regression.h"
#include "rlhf/train/reward_model.h"
#include "rlhf/train/training_steps.h"

namespace rlhf {

/// Bins of calibration errors.
inline constexpr std::size_t kCalibrationBins = 10;
/// Tokens of a pass of the reward model that only reads.
inline constexpr std::int64_t kRatedTokensPerPass = 2048;
/// The steps of the reward-model stage over pairs or rated answers.
TrainingPlan reward_plan(const RewardModelOptions& options, std::size_t num_items);

/// Outputs of a reward model for some answers, [positions][num_outputs] each. Every sequence needs a token.
std::vector<std::vector<double>> read_outputs(SequencePass<float>& pass, const DecoderWeights<float>& weights,
                                              const RewardReading& reading,
                                              const std::vector<TrainingExample>& answers,
                                              std::int64_t max_tokens_per_pass);

/// How well a reward model predicts held-out ratings, one entry for each of its outputs.
std::vector<ppo::RegressionQuality> evaluate_ratings(SequencePass<float>& pass,
                                                     const DecoderWeights<float>& weights,
                                                     const RewardReading& reading,
                                                     const std::vector<RatedExample>& rated);

/// Trains `reward`, whose head has reading.num_outputs() labels, on ratings with ppo::regression_loss: of
/// answers by one or several objectives, or of their steps (Uesato et al. 2022; Lightman et al. 2023).
void run_reward_rating(Parameters<float>& reward, const std::vector<RatedExample>& train,
                       const RewardReading& reading, const RewardModelOptions& options,
                       const StageContext& context);

}  // namespace rlhf

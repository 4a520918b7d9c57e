#pragma once

#include "rlhf/train/pair_loss.h"
#include "rlhf/train/preference_options.h"
#include "rlhf/train/stage.h"
#include "rlhf/train/task_data.h"
#include "rlhf/train/unpaired.h"

namespace rlhf {

/// The stage `preference`: learns from pairs without a reward model and without sampling (DPO, Rafailov et
/// al. 2023, and its relatives). The reference is the policy as it is when this is made; only its log-probs
/// are kept, no second copy of the weights.
class PreferenceStage {
 public:
  /// @throws InvalidArgument when there are no pairs, or a pair has a side without a token to learn from or
  /// more tokens than the model's context
  PreferenceStage(LanguageModel& policy, const TaskData& data, const PreferenceStageOptions& options,
                  const StageContext& context);

  /// Trains the policy. @throws StageStopped, Error naming the step when the loss is not finite
  void run();
  /// How the policy as it is now orders the held-out pairs; without any, zeros. The loss is that of the
  /// pairs, for unpaired losses DPO's.
  PairMeasure judge_held_out();

 private:
  void run_pairs(const TrainingPlan& plan);
  void run_unpaired(const TrainingPlan& plan);

  const PreferenceStageOptions& options_;
  const StageContext& context_;
  Parameters<float>& policy_;
  const TaskData& data_;
  SequencePass<float> pass_;
  PairLoss loss_;
  PairBatch held_out_;
  std::vector<LabelledExample> labelled_;    ///< of unpaired losses
  std::vector<TrainingExample> mismatched_;  ///< of KTO
};

}  // namespace rlhf

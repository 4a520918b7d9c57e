#pragma once

#include "rlhf/train/optimizer.h"
#include "rlhf/train/stage.h"
#include "rlhf/train/task_data.h"

namespace rlhf {

/// Supervised fine-tuning (and pre-training, where every token carries loss).
struct SftOptions {
  double epochs = 1;           ///< passes over the data; used when max_steps is 0
  std::int64_t max_steps = 0;  ///< optimizer steps; 0 = as epochs says
  std::int64_t examples_per_step = 16;
  std::int64_t max_tokens_per_micro_batch = 1024;
  OptimizerOptions optimizer;

  template <class V>
  void visit_fields(V& v) {
    v.field("epochs", epochs, "Passes over the data; used when max_steps is 0", {0, 1000});
    v.field("max_steps", max_steps, "Optimizer steps; 0 = as epochs says", {0, 1e9});
    v.field("examples_per_step", examples_per_step, "Examples per optimizer step", {1, 1e6});
    v.field("max_tokens_per_micro_batch", max_tokens_per_micro_batch, "Tokens per forward/backward pass",
            {1, 1e7});
    v.group("optimizer", optimizer, "AdamW");
  }
};

/// Minimises the mean negative log-likelihood of the tokens whose mask is 1. The mean is taken over all such
/// tokens of the optimizer step, however they fall into micro-batches. Examples are packed without padding.
/// @throws StageStopped, Error naming the step when the loss is not finite.
void run_sft(LanguageModel& model, const std::vector<TrainingExample>& examples, const SftOptions& options,
             const std::string& stage, const StageContext& context);

}  // namespace rlhf

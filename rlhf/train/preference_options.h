#pragma once

#include <cstdint>
#include <optional>

#include "rlhf/ppo/preference_loss.h"
#include "rlhf/train/optimizer.h"

namespace rlhf {

/// Offline preference learning: DPO and its relatives on pairs, KTO on single responses.
struct PreferenceStageOptions {
  double epochs = 1;           ///< passes over the pairs; used when max_steps is 0
  std::int64_t max_steps = 0;  ///< optimizer steps; 0 = as epochs says
  std::int64_t pairs_per_step = 16;
  std::int64_t max_tokens_per_micro_batch = 2048;
  ppo::PreferenceOptions loss;
  std::optional<ppo::UnpairedOptions> unpaired;  ///< when given, it is used and `loss` is not
  OptimizerOptions optimizer;

  template <class V>
  void visit_fields(V& v) {
    v.field("epochs", epochs, "Passes over the pairs; used when max_steps is 0", {0, 1000});
    v.field("max_steps", max_steps, "Optimizer steps; 0 = as epochs says", {0, 1e9});
    v.field("pairs_per_step", pairs_per_step,
            "Pairs per optimizer step; with unpaired, twice as many responses", {1, 1e6});
    v.field("max_tokens_per_micro_batch", max_tokens_per_micro_batch,
            "Tokens per forward/backward pass; heads that sequences have in common count once", {2, 1e7});
    v.group("loss", loss, "Loss on pairs");
    v.group("unpaired", unpaired,
            "Instead of loss: KTO on single responses, those of data.labels_file or the sides of the pairs");
    v.group("optimizer", optimizer, "AdamW");
  }
};

}  // namespace rlhf

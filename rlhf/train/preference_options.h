#pragma once

#include <cstdint>
#include <optional>

#include "rlhf/ppo/preference_loss.h"
#include "rlhf/train/optimizer.h"

namespace rlhf {

/// Offline preference learning: DPO and its relatives on pairs.
struct PreferenceStageOptions {
  double epochs = 1;           ///< passes over the pairs; used when max_steps is 0
  std::int64_t max_steps = 0;  ///< optimizer steps; 0 = as epochs says
  std::int64_t pairs_per_step = 16;
  std::int64_t max_tokens_per_micro_batch = 2048;
  ppo::PreferenceOptions loss;
  OptimizerOptions optimizer;

  template <class V>
  void visit_fields(V& v) {
    v.field("epochs", epochs, "Passes over the pairs; used when max_steps is 0", {0, 1000});
    v.field("max_steps", max_steps, "Optimizer steps; 0 = as epochs says", {0, 1e9});
    v.field("pairs_per_step", pairs_per_step, "Pairs per optimizer step", {1, 1e6});
    v.field("max_tokens_per_micro_batch", max_tokens_per_micro_batch,
            "Tokens per forward/backward pass; heads that sequences have in common count once", {2, 1e7});
    v.group("loss", loss, "Loss on pairs");
    v.group("optimizer", optimizer, "AdamW");
  }
};

}  // namespace rlhf

#pragma once

#include <cstddef>

#include "rlhf/config/field.h"

// A leaf: includes nothing of this library but the option visitor, so that every layer may use it.

namespace rlhf {

/// Shape of the learning rate between warmup and the last step.
enum class LrShape {
  kConstant,
  kLinear,              ///< to 0
  kCosine,              ///< to min_ratio; periodic beyond the last step, as in the frameworks
  kCosineWithRestarts,  ///< `cycles` half-waves to 0
  kPolynomial,          ///< to min_ratio with exponent `power`
  kInverseSqrt,         ///< 1 / sqrt(step / warmup)
  kWarmupStableDecay,   ///< flat, then a cosine to min_ratio over the last decay_steps
};

struct LrScheduleOptions {
  LrShape shape = LrShape::kLinear;
  std::size_t warmup_steps = 0;  ///< steps of linear rise from start_ratio to 1
  double warmup_ratio = 0;       ///< warmup as a share of all steps, rounded up; used when warmup_steps is 0
  double start_ratio = 0;        ///< rate at step 0 of the warmup, as a fraction of the base rate
  double min_ratio = 0;          ///< rate at the end, as a fraction of the base rate
  double cycles = 0.5;           ///< cosine: waves (0.5 = one descent); restarts: number of descents
  double power = 1.0;            ///< polynomial exponent
  std::size_t decay_steps = 0;   ///< of warmup_stable_decay; 0 uses stable_ratio
  double stable_ratio = 0.9;     ///< flat share of the steps after warmup, rounded down

  template <class V>
  void visit_fields(V& v) {
    v.choice("shape", shape,
             {{"constant", LrShape::kConstant},
              {"linear", LrShape::kLinear},
              {"cosine", LrShape::kCosine},
              {"cosine_with_restarts", LrShape::kCosineWithRestarts},
              {"polynomial", LrShape::kPolynomial},
              {"inverse_sqrt", LrShape::kInverseSqrt},
              {"warmup_stable_decay", LrShape::kWarmupStableDecay}},
             "Shape of the learning rate after warmup");
    v.field("warmup_steps", warmup_steps, "Steps of linear rise");
    v.field("warmup_ratio", warmup_ratio, "Warmup as a share of all steps, when warmup_steps is 0",
            config::fraction());
    v.field("start_ratio", start_ratio, "Rate at the first warmup step over the base rate",
            config::fraction());
    v.field("min_ratio", min_ratio, "Rate at the end over the base rate", config::fraction());
    v.field("cycles", cycles, "Cosine waves (0.5 = one descent), or number of restarts", config::positive());
    v.field("power", power, "Exponent of polynomial decay", config::positive());
    v.field("decay_steps", decay_steps, "Steps of decay in warmup_stable_decay; 0 uses stable_ratio");
    v.field("stable_ratio", stable_ratio, "Flat share of the steps after warmup", config::fraction());
  }
};

/// Learning rate over base rate at optimizer step `step` (0 = before the first step) of `total_steps`. Steps
/// past the end are defined as in transformers: linear stays 0, cosine goes on periodically.
double learning_rate_factor(const LrScheduleOptions& options, std::size_t step, std::size_t total_steps);

}  // namespace rlhf

#pragma once

#include <span>
#include <vector>

#include "rlhf/config/field.h"
#include "rlhf/ppo/aggregation.h"

namespace rlhf::ppo {

enum class ValueError {
  kSquared,  ///< (v - return)^2
  kHuber,    ///< Huber with delta `huber_delta`, scaled so that it equals the square near 0
};

struct ValueLossOptions {
  ValueError error = ValueError::kSquared;
  double huber_delta = 1.0;
  /// Half-width of the band around the old value (PPO2's value clip); 0 = no clip.
  double clip_range = 0.2;
  /// Weight in the joint loss of policy and value (TRL 0.1); 1 where the critic has its own optimizer.
  double coefficient = 1.0;
  AggregationOptions aggregation;

  template <class V>
  void visit_fields(V& v) {
    v.choice("error", error, {{"squared", ValueError::kSquared}, {"huber", ValueError::kHuber}},
             "Error of a value");
    v.field("huber_delta", huber_delta, "Where the Huber error becomes linear", config::positive());
    v.field("clip_range", clip_range, "Half-width of the band around the old value; 0 turns the clip off",
            config::at_least(0));
    v.field("coefficient", coefficient, "Weight of the value loss beside the policy loss",
            config::at_least(0));
    v.group("aggregation", aggregation, "How per-token value losses become one number");
  }
};

struct ValueLossInputs {
  TokenRows rows;                      ///< positions of the values; TRL's slot after the last token included
  std::span<const double> values;      ///< new values
  std::span<const double> old_values;  ///< values at rollout time; only read when clipping
  std::span<const double> returns;
  AggregationContext context;
};

struct ValueLossResult {
  double loss = 0;               ///< 0.5 * aggregate(error), times `coefficient`
  std::vector<double> d_values;  ///< d loss / d value, per position
  double clip_fraction = 0;      ///< share of tokens whose clipped error is the larger one
  double explained_variance =
      0;  ///< 1 - var(return - value) / var(return) over counting tokens; 0 if var is 0
  double value_mean = 0;
  double error_mean = 0;  ///< mean of (value - return)^2
};

/// Value loss 0.5 * max(error(v), error(clip(v, v_old +- range))) of PPO2, aggregated.
/// @throws InvalidArgument on sizes that do not fit.
ValueLossResult value_loss(const ValueLossOptions& options, const ValueLossInputs& inputs);

}  // namespace rlhf::ppo

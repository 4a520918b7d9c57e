#include "rlhf/ppo/value_loss.h"

#include <algorithm>
#include <cmath>

#include "rlhf/ppo/kl.h"
#include "rlhf/ppo/rows.h"

namespace rlhf::ppo {
namespace {

// Value and derivative of the error with respect to its first argument.
ValueAndGradient error_of(const ValueLossOptions& options, double value, double target) {
  const double e = value - target;
  if (options.error == ValueError::kHuber && std::abs(e) > options.huber_delta) {
    const double delta = options.huber_delta;
    return {delta * (2 * std::abs(e) - delta), e > 0 ? 2 * delta : -2 * delta};
  }
  return {e * e, 2 * e};
}

struct TokenLoss {
  ValueAndGradient loss;
  bool clipped = false;
};

TokenLoss token_loss(const ValueLossOptions& options, double value, double old_value, double target) {
  const ValueAndGradient plain = error_of(options, value, target);
  if (options.clip_range <= 0) return {plain, false};
  const double low = old_value - options.clip_range;
  const double high = old_value + options.clip_range;
  ValueAndGradient clipped = error_of(options, std::clamp(value, low, high), target);
  if (value < low || value > high) clipped.gradient = 0;
  if (clipped.value > plain.value) return {clipped, true};
  return {plain, false};
}

double variance_of(const TokenRows& rows, std::span<const double> values) {
  const double mean = masked_mean(rows, values);
  double sum = 0;
  for (std::size_t t = 0; t < values.size(); ++t) {
    if (rows.counts(t)) sum += (values[t] - mean) * (values[t] - mean);
  }
  return sum;
}

}  // namespace

ValueLossResult value_loss(const ValueLossOptions& options, const ValueLossInputs& inputs) {
  const TokenRows& rows = inputs.rows;
  check_rows(rows);
  check_positions(rows, inputs.values.size(), "value loss: values");
  check_positions(rows, inputs.returns.size(), "value loss: returns");
  if (options.clip_range > 0) check_positions(rows, inputs.old_values.size(), "value loss: old values");

  const std::vector<double> weights = aggregation_weights(options.aggregation, rows, inputs.context);
  ValueLossResult result;
  result.d_values.resize(rows.positions());
  std::vector<double> residual(rows.positions());
  std::vector<double> clipped(rows.positions());
  const double scale = 0.5 * options.coefficient;
  for (std::size_t t = 0; t < rows.positions(); ++t) {
    residual[t] = inputs.returns[t] - inputs.values[t];
    if (weights[t] == 0) continue;
    const double old_value = options.clip_range > 0 ? inputs.old_values[t] : 0.0;
    const TokenLoss token = token_loss(options, inputs.values[t], old_value, inputs.returns[t]);
    result.loss += scale * weights[t] * token.loss.value;
    result.d_values[t] = scale * weights[t] * token.loss.gradient;
    clipped[t] = token.clipped;
  }
  result.clip_fraction = masked_mean(rows, clipped);
  result.value_mean = masked_mean(rows, inputs.values);
  for (double& r : clipped) r = 0;
  for (std::size_t t = 0; t < residual.size(); ++t) clipped[t] = residual[t] * residual[t];
  result.error_mean = masked_mean(rows, clipped);
  const double spread = variance_of(rows, inputs.returns);
  result.explained_variance = spread > 0 ? 1.0 - variance_of(rows, residual) / spread : 0.0;
  return result;
}

}  // namespace rlhf::ppo

#include "rlhf/ppo/reward_regression.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "rlhf/core/error.h"

namespace rlhf::ppo {
namespace {

double mean(std::span<const double> values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

double calibration_error(std::span<const double> outputs, std::span<const double> targets, std::size_t bins) {
  std::vector<std::size_t> order(outputs.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::ranges::stable_sort(order, {}, [&](std::size_t i) { return outputs[i]; });
  double error = 0;
  for (std::size_t bin = 0; bin < bins; ++bin) {
    double difference = 0;
    for (std::size_t i = bin * order.size() / bins; i < (bin + 1) * order.size() / bins; ++i)
      difference += targets[order[i]] - outputs[order[i]];
    error += std::abs(difference);
  }
  return error / static_cast<double>(order.size());
}

}  // namespace

RegressionResult regression_loss(std::span<const double> outputs, std::span<const double> targets) {
  RLHF_CHECK(!outputs.empty() && outputs.size() == targets.size(), "reward regression: ", outputs.size(),
             " outputs for ", targets.size(), " targets");
  RegressionResult result;
  const double scale = 1.0 / static_cast<double>(outputs.size());
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    RLHF_CHECK(std::isfinite(targets[i]), "reward regression: target ", i, " is ", targets[i]);
    const double error = outputs[i] - targets[i];
    result.loss += scale * error * error;
    result.d_outputs.push_back(2 * scale * error);
  }
  return result;
}

RegressionQuality regression_quality(std::span<const double> outputs, std::span<const double> targets,
                                     std::size_t bins) {
  RLHF_CHECK(bins > 0, "reward regression: no bins");
  RegressionQuality quality;
  quality.count = outputs.size();
  quality.mean_squared_error = regression_loss(outputs, targets).loss;
  const double mean_output = mean(outputs), mean_target = mean(targets);
  double product = 0, squares_output = 0, squares_target = 0;
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    const double x = outputs[i] - mean_output, y = targets[i] - mean_target;
    product += x * y;
    squares_output += x * x;
    squares_target += y * y;
  }
  const double scale = std::sqrt(squares_output * squares_target);
  quality.correlation = scale > 0 ? product / scale : 0;
  quality.calibration_error = calibration_error(outputs, targets, bins);
  return quality;
}

}  // namespace rlhf::ppo

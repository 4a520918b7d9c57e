#pragma once

#include <cstddef>
#include <span>
#include <vector>

namespace rlhf::ppo {

struct RegressionResult {
  double loss = 0;                ///< mean over all numbers of (output - target)^2
  std::vector<double> d_outputs;  ///< d loss / d output
};

/// Squared error of a reward model's outputs. Steps and objectives of an answer count one by one.
/// @throws InvalidArgument on no numbers, sizes that do not fit or a target that is not finite (its place
/// named)
RegressionResult regression_loss(std::span<const double> outputs, std::span<const double> targets);

/// How well predictions follow their targets.
struct RegressionQuality {
  std::size_t count = 0;
  double mean_squared_error = 0;
  double correlation = 0;  ///< Pearson's; 0 where one side has no spread
  /// Expected calibration error of a prediction as such: over equally large bins in the order of the
  /// predictions, the mean of |mean target - mean prediction|, weighted by the bin's share.
  double calibration_error = 0;
};

/// @throws InvalidArgument on no numbers, no bins or sizes that do not fit
RegressionQuality regression_quality(std::span<const double> outputs, std::span<const double> targets,
                                     std::size_t bins);

}  // namespace rlhf::ppo

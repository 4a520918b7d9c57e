#include "rlhf/report/interval.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "rlhf/core/error.h"
#include "rlhf/core/random.h"

namespace rlhf {
namespace {

constexpr double kZ = 1.959963984540054;  // 97.5 % quantile of the normal distribution
constexpr std::size_t kResamples = 2000;

// Linear interpolation between order statistics (type 7 of Hyndman and Fan).
double sorted_quantile(const std::vector<double>& sorted, double q) {
  const double position = q * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<std::size_t>(position);
  const std::size_t above = std::min(below + 1, sorted.size() - 1);
  return sorted[below] + (position - static_cast<double>(below)) * (sorted[above] - sorted[below]);
}

}  // namespace

Interval wilson_interval(std::size_t successes, std::size_t trials) {
  RLHF_CHECK(successes <= trials, "Wilson interval: ", successes, " successes of ", trials, " trials");
  if (trials == 0) return {0, 1};
  const auto n = static_cast<double>(trials);
  const double p = static_cast<double>(successes) / n;
  const double centre = p + kZ * kZ / (2 * n);
  const double half = kZ * std::sqrt(p * (1 - p) / n + kZ * kZ / (4 * n * n));
  const double scale = 1 + kZ * kZ / n;
  return {std::max(0.0, (centre - half) / scale), std::min(1.0, (centre + half) / scale)};
}

Interval bootstrap_mean_interval(std::span<const double> values, std::uint64_t seed) {
  constexpr std::uint64_t kStream = 0x626f6f74;  // "boot"
  RLHF_CHECK(!values.empty(), "bootstrap interval: no values");
  for (const double value : values)
    RLHF_CHECK(std::isfinite(value), "bootstrap interval: a value is ", value);
  RandomStream random(seed, kStream);
  std::vector<double> means(kResamples);
  for (double& mean : means) {
    double sum = 0;
    for (std::size_t i = 0; i < values.size(); ++i) sum += values[random.below(values.size())];
    mean = sum / static_cast<double>(values.size());
  }
  std::sort(means.begin(), means.end());
  return {sorted_quantile(means, 0.025), sorted_quantile(means, 0.975)};
}

Interval paired_difference_interval(std::span<const double> before, std::span<const double> after,
                                    std::uint64_t seed) {
  RLHF_CHECK(before.size() == after.size(), "paired interval: ", before.size(), " and ", after.size(),
             " values");
  std::vector<double> differences(before.size());
  for (std::size_t i = 0; i < before.size(); ++i) differences[i] = after[i] - before[i];
  return bootstrap_mean_interval(differences, seed);
}

}  // namespace rlhf

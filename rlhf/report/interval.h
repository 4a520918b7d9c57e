#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace rlhf {

/// A two-sided confidence interval of 95 %.
struct Interval {
  double low = 0;
  double high = 0;
};

/// Wilson score interval of a proportion (Wilson 1927), without continuity correction; [0, 1] for no trials.
/// @throws InvalidArgument when `successes` exceeds `trials`.
Interval wilson_interval(std::size_t successes, std::size_t trials);

/// Percentile bootstrap interval of a mean from 2000 resamples; a function of values and seed. One value
/// gives [value, value]. @throws InvalidArgument for no values, or one that is not finite.
Interval bootstrap_mean_interval(std::span<const double> values, std::uint64_t seed);

/// The same for the mean of `after[i] - before[i]`: two policies on the same cases, where pairing removes the
/// spread between cases. @throws InvalidArgument when the lengths differ.
Interval paired_difference_interval(std::span<const double> before, std::span<const double> after,
                                    std::uint64_t seed);

}  // namespace rlhf

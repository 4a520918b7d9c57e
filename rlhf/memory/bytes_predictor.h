#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>

namespace rlhf {

/// Predicts the bytes of a piece of work: a formula, corrected by what such work was measured to take. The
/// correction is affine, by least squares over the last observations; where these are all alike, it is the
/// smallest one that explains them. Not thread-safe.
class BytesPredictor {
 public:
  static constexpr std::size_t kEnough = 8;     ///< observations from which the formula is corrected
  static constexpr double kFirstMargin = 0.10;  ///< until then
  static constexpr double kLeastMargin = 0.01;

  /// Bytes to set aside for work that takes `formula` bytes by the formula: the corrected value and the
  /// margin, never less than the formula (buffers are made when they are first used, so what was measured may
  /// be less than what the same work takes later), and never more than it and the first margin as long as
  /// nothing has taken more.
  std::uint64_t predict(std::uint64_t formula) const;
  /// Learns what work really took. `formula` above 0.
  void observe(std::uint64_t formula, std::uint64_t measured);

  /// Share that a prediction adds to the corrected value: the worst underestimate among the last
  /// observations, or three of their root mean squares, up to twice that while there are few.
  double margin() const { return margin_; }
  /// (corrected value - measured) / measured of the last observation, before it was learned.
  double last_error() const { return last_error_; }
  std::size_t num_observations() const { return num_observations_; }

 private:
  struct Observation {
    double formula, measured;
  };
  double corrected(double formula) const;
  void fit();

  std::deque<Observation> window_;
  std::size_t num_observations_ = 0;
  double offset_ = 0, slope_ = 0;  ///< measured = formula + offset + slope * formula
  double margin_ = kFirstMargin, last_error_ = 0, worst_ratio_ = 0, largest_formula_ = 0;
};

}  // namespace rlhf

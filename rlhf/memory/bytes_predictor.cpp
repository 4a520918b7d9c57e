#include "rlhf/memory/bytes_predictor.h"

#include <Eigen/Dense>
#include <algorithm>
#include <cmath>

#include "rlhf/core/error.h"

namespace rlhf {
namespace {

constexpr std::size_t kWindow = 128;
constexpr std::size_t kRefit = 16;  // observations between two fits, once there are many

}  // namespace

double BytesPredictor::corrected(double formula) const {
  return std::max(0.0, formula + offset_ + slope_ * formula);
}

std::uint64_t BytesPredictor::predict(std::uint64_t formula) const {
  const auto by_formula = static_cast<double>(formula);
  const double bound = by_formula * (1 + kFirstMargin);
  double bytes = std::max(by_formula, corrected(by_formula) * (1 + margin_));
  if (by_formula > largest_formula_)
    bytes = std::max(bytes, bound);
  else if (worst_ratio_ <= 1 + kFirstMargin)
    bytes = std::min(bytes, bound);
  return static_cast<std::uint64_t>(std::ceil(bytes));
}

void BytesPredictor::observe(std::uint64_t formula, std::uint64_t measured) {
  RLHF_CHECK(formula > 0, "bytes predictor: a formula of 0 bytes");
  const Observation now{static_cast<double>(formula), static_cast<double>(measured)};
  if (measured > 0) last_error_ = corrected(now.formula) / now.measured - 1;
  worst_ratio_ = std::max(worst_ratio_, now.measured / now.formula);
  largest_formula_ = std::max(largest_formula_, now.formula);
  window_.push_back(now);
  if (window_.size() > kWindow) window_.pop_front();
  ++num_observations_;
  const bool few = num_observations_ < 2 * kRefit;
  if (num_observations_ >= kEnough && (few || num_observations_ % kRefit == 0)) fit();
}

void BytesPredictor::fit() {
  const auto n = static_cast<Eigen::Index>(window_.size());
  double mean = 0;
  for (const Observation& o : window_) mean += o.formula / static_cast<double>(n);
  // Columns of equal size, so that the smallest solution is a fair one.
  Eigen::MatrixX2d features(n, 2);
  Eigen::VectorXd excess(n);
  for (Eigen::Index i = 0; i < n; ++i) {
    const Observation& o = window_[static_cast<std::size_t>(i)];
    features.row(i) << 1, o.formula / mean;
    excess(i) = (o.measured - o.formula) / mean;
  }
  auto solver = features.completeOrthogonalDecomposition();
  solver.setThreshold(1e-6);
  const Eigen::Vector2d solution = solver.solve(excess);
  offset_ = solution(0) * mean;
  slope_ = solution(1);
  double worst = 0, squares = 0;
  for (const Observation& o : window_) {
    const double residual = o.measured / std::max(1.0, corrected(o.formula)) - 1;
    worst = std::max(worst, residual);
    squares += residual * residual / static_cast<double>(n);
  }
  // A fit to few observations hides part of their spread.
  const double few = 1 + static_cast<double>(kEnough) / static_cast<double>(n);
  margin_ = std::max({kLeastMargin, worst, 3 * few * std::sqrt(squares)});
}

}  // namespace rlhf

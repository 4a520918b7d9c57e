#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "tests/catch.h"

namespace rlhf::torch_test {

inline std::vector<float> normal(std::int64_t count, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> draw;
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) value = draw(engine);
  return values;
}

/// A copy in double: the oracle's own rounding does not count.
template <class T>
at::Tensor tensor(const T* values, at::IntArrayRef shape) {
  const auto type = sizeof(T) == 4 ? at::kFloat : at::kDouble;
  return at::from_blob(const_cast<T*>(values), shape, type).to(at::kDouble, false, true);
}
inline at::Tensor tensor(const std::vector<float>& values, at::IntArrayRef shape) {
  return tensor(values.data(), shape);
}
inline at::Tensor leaf(const std::vector<float>& values, at::IntArrayRef shape) {
  return tensor(values, shape).requires_grad_();
}

/// Largest difference, as a share of the oracle's largest magnitude. Sums round by their largest terms, so an
/// element that happens to be small is no more exact than its neighbours.
template <class T>
double difference(const T* actual, const at::Tensor& expected) {
  const at::Tensor flat = expected.detach().to(at::kDouble).contiguous();
  const double* reference = flat.const_data_ptr<double>();
  double largest = 1e-30, worst = 0;
  for (std::int64_t i = 0; i < flat.numel(); ++i) {
    largest = std::max(largest, std::abs(reference[i]));
    const double error = std::abs(static_cast<double>(actual[i]) - reference[i]);
    if (!(error <= worst)) worst = error;  // a NaN is kept
  }
  return worst / largest;
}
inline double difference(const std::vector<float>& actual, const at::Tensor& expected) {
  REQUIRE(static_cast<std::int64_t>(actual.size()) == expected.numel());
  return difference(actual.data(), expected);
}

}  // namespace rlhf::torch_test

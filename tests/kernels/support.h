#pragma once
// What the kernel tests share: every instruction set of this machine, seeded inputs, and bounds on rounding.

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "rlhf/core/random.h"
#include "rlhf/core/thread_pool.h"
#include "rlhf/kernels/ops.h"
#include "tests/catch.h"

namespace rlhf {

inline std::vector<kernels::CpuIsa> supported_isas() {
  std::vector<kernels::CpuIsa> isas;
  for (auto isa : {kernels::CpuIsa::kBaseline, kernels::CpuIsa::kAvx2, kernels::CpuIsa::kAvx512})
    if (kernels::cpu_supports(isa)) isas.push_back(isa);
  return isas;
}

template <class T>
std::vector<T> random_values(std::int64_t count, std::uint64_t stream, double scale = 1) {
  RandomStream random(20240917, stream);
  std::vector<T> values(static_cast<std::size_t>(count));
  for (T& value : values) value = static_cast<T>(scale * random.normal());
  return values;
}

template <class T>
std::vector<double> to_double(const std::vector<T>& values) {
  return {values.begin(), values.end()};
}

/// Rounding unit of T.
template <class T>
constexpr double kUnit = static_cast<double>(std::numeric_limits<T>::epsilon());

/// Counts the elements that are off by more than `absolute + relative * |expected|`, and reports the worst.
template <class T>
void check_close(const std::vector<T>& got, const std::vector<double>& expected, double absolute,
                 double relative) {
  REQUIRE(got.size() == expected.size());
  std::size_t off = 0, worst = 0;
  double worst_excess = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double error = std::abs(static_cast<double>(got[i]) - expected[i]);
    const double excess = error / (absolute + relative * std::abs(expected[i]));
    if (excess <= 1) continue;
    ++off;
    if (!(excess <= worst_excess)) {
      worst_excess = excess;
      worst = i;
    }
  }
  if (off > 0) {
    INFO(off << " of " << got.size() << " elements off; element " << worst << " is " << got[worst]
             << ", expected " << expected[worst]);
    CHECK(off == 0);
  }
}

/// Central difference of `loss` in the double `x`.
template <class Loss>
double slope_of(double& x, const Loss& loss, double step = 1e-5) {
  const double at = x;
  x = at + step;
  const double above = loss();
  x = at - step;
  const double below = loss();
  x = at;
  return (above - below) / (2 * step);
}

/// Runs `fn(compute)` with 1, 2 and 3 threads; each call returns a vector that must be equal bit for bit.
template <class T, class Fn>
void check_same_for_any_thread_count(const Fn& fn) {
  for (const auto isa : supported_isas()) {
    std::vector<T> first;
    for (int threads : {1, 2, 3}) {
      ThreadPool pool(threads);
      const Compute<T> compute(pool, isa);
      const std::vector<T> result = fn(compute);
      INFO(compute.table().isa << ", " << threads << " threads");
      if (threads == 1)
        first = result;
      else
        CHECK(result == first);
    }
  }
}

}  // namespace rlhf

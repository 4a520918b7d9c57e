#pragma once
// The CPU's top-k, top-p and min-p of a row of logits.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "rlhf/kernels/device_kernels.h"

namespace rlhf::kernels {

/// Removes what RowFilter says, from a sorted row. Returns the log-sum-exp of the whole row; NaN, and the row
/// as it is, where nothing can be drawn.
template <class T>
double filter_one(T* logits, std::int64_t V, double scale, const RowFilter& filter) {
  std::vector<std::int64_t> order;
  bool is_nan = false;
  for (std::int64_t i = 0; i < V; ++i) {
    is_nan = is_nan || std::isnan(logits[i]);
    if (logits[i] != -std::numeric_limits<T>::infinity()) order.push_back(i);
  }
  if (is_nan || order.empty()) return std::numeric_limits<double>::quiet_NaN();
  std::ranges::stable_sort(order, [&](auto a, auto b) { return logits[a] > logits[b]; });
  const double largest = static_cast<double>(logits[order[0]]);
  if (!std::isfinite(largest)) return std::numeric_limits<double>::quiet_NaN();
  const auto x = [&](std::int64_t i) { return (static_cast<double>(logits[i]) - largest) * scale; };
  double all = 0;
  for (const auto i : order) all += std::exp(x(i));
  std::size_t kept = order.size();
  if (filter.top_k > 0 && static_cast<std::size_t>(filter.top_k) < kept) {
    kept = static_cast<std::size_t>(filter.top_k);
    while (kept < order.size() && logits[order[kept]] == logits[order[kept - 1]]) ++kept;
  }
  if (filter.top_p < 1) {
    double mass = 0, above = 0;
    for (std::size_t i = 0; i < kept; ++i) mass += std::exp(x(order[i]));
    std::size_t count = 0;
    while (count < kept && (count == 0 || above < filter.top_p * mass)) above += std::exp(x(order[count++]));
    kept = count;
  }
  while (kept > 1 && x(order[kept - 1]) < filter.log_min_p) --kept;
  std::vector<T> values;
  for (std::size_t i = 0; i < kept; ++i) values.push_back(logits[order[i]]);
  std::fill_n(logits, V, -std::numeric_limits<T>::infinity());
  for (std::size_t i = 0; i < kept; ++i) logits[order[i]] = values[i];
  return largest * scale + std::log(all);
}

}  // namespace rlhf::kernels

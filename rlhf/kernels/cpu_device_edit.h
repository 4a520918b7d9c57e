#pragma once
// The CPU's edits of a row of logits.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "rlhf/kernels/device_kernels.h"

namespace rlhf::kernels {

/// Edits a row. Returns the log-sum-exp of the row as it was.
template <class T>
double edit_one(T* logits, std::int64_t V, double scale, const RowEdits& edits) {
  const double largest = static_cast<double>(*std::max_element(logits, logits + V));
  double mass = 0;
  for (std::int64_t i = 0; i < V; ++i) mass += std::exp((static_cast<double>(logits[i]) - largest) * scale);
  if (edits.num_allowed > 0) {
    std::vector<T> row(static_cast<std::size_t>(V), -std::numeric_limits<T>::infinity());
    for (std::int64_t i = 0; i < edits.num_allowed; ++i)
      row[static_cast<std::size_t>(edits.allowed[i])] = logits[edits.allowed[i]];
    std::ranges::copy(row, logits);
  }
  for (std::int64_t i = 0; i < edits.num_edits; ++i) {
    LogitEdit& edit = edits.edits[i];
    T& logit = logits[edit.token];
    const T was = logit;
    logit = edited_logit(edit, was);
    edit.bias = static_cast<float>(was);
  }
  return largest * scale + std::log(mass);
}

/// The logit that a token of an edited row had; NaN for token -1.
template <class T>
double unedited_logit(const T* logits, const RowEdits& edits, TokenId token) {
  if (token < 0) return std::numeric_limits<double>::quiet_NaN();
  for (std::int64_t i = 0; i < edits.num_edits; ++i)
    if (edits.edits[i].token == token) return static_cast<double>(edits.edits[i].bias);
  return static_cast<double>(logits[token]);
}

}  // namespace rlhf::kernels

#include "rlhf/ppo/rows.h"

#include "rlhf/core/error.h"

namespace rlhf::ppo {

void check_rows(const TokenRows& rows) {
  if (rows.offsets.empty()) {
    RLHF_CHECK(rows.mask.empty(), "token rows: a mask of ", rows.mask.size(), " tokens without offsets");
    return;
  }
  RLHF_CHECK(rows.offsets.front() == 0, "token rows: the first offset is ", rows.offsets.front(),
             ", expected 0");
  for (std::size_t row = 0; row < rows.rows(); ++row) {
    RLHF_CHECK(rows.begin(row) <= rows.end(row), "token rows: offset ", row + 1, " is ", rows.end(row),
               ", below the one before it, ", rows.begin(row));
  }
  RLHF_CHECK(rows.mask.empty() || rows.mask.size() == rows.positions(), "token rows: the mask has ",
             rows.mask.size(), " tokens, the offsets end at ", rows.positions());
}

void check_positions(const TokenRows& rows, std::size_t size, const char* what) {
  RLHF_CHECK(size == rows.positions(), what, ": ", size, " values for ", rows.positions(),
             " token positions");
}

void check_row_values(const TokenRows& rows, std::size_t size, const char* what) {
  RLHF_CHECK(size == rows.rows(), what, ": ", size, " values for ", rows.rows(), " responses");
}

std::size_t count_tokens(const TokenRows& rows, std::size_t row) {
  if (rows.mask.empty()) return rows.width(row);
  std::size_t count = 0;
  for (std::size_t t = rows.begin(row); t < rows.end(row); ++t) count += rows.counts(t);
  return count;
}

std::size_t count_tokens(const TokenRows& rows) {
  std::size_t count = 0;
  for (std::size_t row = 0; row < rows.rows(); ++row) count += count_tokens(rows, row);
  return count;
}

std::size_t count_active_rows(const TokenRows& rows) {
  std::size_t count = 0;
  for (std::size_t row = 0; row < rows.rows(); ++row) count += count_tokens(rows, row) > 0;
  return count;
}

double row_sum(const TokenRows& rows, std::size_t row, std::span<const double> values) {
  double sum = 0;
  for (std::size_t t = rows.begin(row); t < rows.end(row); ++t) {
    if (rows.counts(t)) sum += values[t];
  }
  return sum;
}

double masked_mean(const TokenRows& rows, std::span<const double> values) {
  double sum = 0;
  for (std::size_t row = 0; row < rows.rows(); ++row) sum += row_sum(rows, row, values);
  const std::size_t tokens = count_tokens(rows);
  return tokens == 0 ? 0.0 : sum / static_cast<double>(tokens);
}

}  // namespace rlhf::ppo

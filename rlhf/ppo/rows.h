#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace rlhf::ppo {

/// A ragged batch without padding: row b (one response) is the flat positions [offsets[b], offsets[b + 1]).
/// `mask` has one byte per position, 1 = the token counts; empty means every token counts. A padded B x L
/// matrix is the special case offsets = 0, L, 2L, ... with the padding masked out. Views only: the owner of
/// the memory must outlive them.
struct TokenRows {
  std::span<const std::size_t> offsets;  ///< size rows() + 1, ascending, first 0
  std::span<const std::uint8_t> mask;    ///< size positions(), or empty

  std::size_t rows() const { return offsets.empty() ? 0 : offsets.size() - 1; }
  std::size_t positions() const { return offsets.empty() ? 0 : offsets.back(); }
  std::size_t begin(std::size_t row) const { return offsets[row]; }
  std::size_t end(std::size_t row) const { return offsets[row + 1]; }
  std::size_t width(std::size_t row) const { return end(row) - begin(row); }
  bool counts(std::size_t position) const { return mask.empty() || mask[position] != 0; }
};

/// Checks offsets and mask against one another. @throws InvalidArgument naming the first thing wrong.
void check_rows(const TokenRows& rows);
/// Checks that a per-position array has one value per position. @throws InvalidArgument naming `what`.
void check_positions(const TokenRows& rows, std::size_t size, const char* what);
/// Checks that a per-row array has one value per row. @throws InvalidArgument naming `what`.
void check_row_values(const TokenRows& rows, std::size_t size, const char* what);

/// Number of counting tokens in one row.
std::size_t count_tokens(const TokenRows& rows, std::size_t row);
/// Number of counting tokens in the batch.
std::size_t count_tokens(const TokenRows& rows);
/// Number of rows with at least one counting token.
std::size_t count_active_rows(const TokenRows& rows);

/// Sum of `values` (per position) over the counting tokens of one row.
double row_sum(const TokenRows& rows, std::size_t row, std::span<const double> values);
/// Mean of `values` (per position) over all counting tokens; 0 when there is none.
double masked_mean(const TokenRows& rows, std::span<const double> values);

}  // namespace rlhf::ppo

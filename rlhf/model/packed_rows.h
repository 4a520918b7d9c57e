#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "rlhf/core/ids.h"

namespace rlhf {

/// The tokens of one forward pass, without padding: row t is one token of some sequence.
struct Rows {
  std::vector<TokenId> tokens;              ///< [T]
  std::vector<std::int32_t> positions;      ///< [T] position inside its sequence
  std::vector<const std::int32_t*> tables;  ///< [T] block table of the row's sequence

  std::int64_t size() const { return static_cast<std::int64_t>(tokens.size()); }
};

/// Full sequences laid out for a pass that keeps nothing afterwards (scoring, training); positions count from
/// 0. Heads that sequences have in common are laid out once, in whole K/V blocks of kernels::kBlockTokens
/// tokens: a token's hidden state depends on the tokens before it only, so outputs and gradients are those of
/// separate sequences. Pairs share their prompt, the samples of a group too, and chats their system message.
class PackedRows {
 public:
  /// @param sequences token sequences; empty ones are allowed and take no rows
  explicit PackedRows(const std::vector<std::span<const TokenId>>& sequences);
  PackedRows(const PackedRows&) = delete;  // rows point into blocks_
  PackedRows& operator=(const PackedRows&) = delete;

  const Rows& rows() const { return rows_; }
  /// Row of a token; sequences with a common head have common rows.
  std::int64_t row(std::size_t sequence, std::int64_t position) const;
  std::int64_t last_row(std::size_t sequence) const { return row(sequence, lengths_[sequence] - 1); }
  std::int64_t num_blocks() const { return static_cast<std::int64_t>(first_rows_.size()); }
  /// The rows, grouped so that rows of different groups have no K/V block in common.
  const std::vector<std::vector<std::int64_t>>& trees() const { return trees_; }

 private:
  Rows rows_;
  std::vector<std::int64_t> lengths_;     ///< [sequences]
  std::vector<std::size_t> tables_;       ///< [sequences] where a sequence's table begins in blocks_
  std::vector<std::int32_t> blocks_;      ///< block tables of all sequences
  std::vector<std::int64_t> first_rows_;  ///< [blocks]
  std::vector<std::vector<std::int64_t>> trees_;
};

/// Splits items of `sequences_per_item` consecutive sequences into passes of at most `max_rows` rows, common
/// heads counted once; an item with more rows gets a pass of its own. Items are taken in the order of their
/// first sequence's tokens, so that common heads meet. Returns item indices.
std::vector<std::vector<std::size_t>> split_into_passes(
    const std::vector<std::span<const TokenId>>& sequences, std::int64_t max_rows,
    std::size_t sequences_per_item = 1);

}  // namespace rlhf

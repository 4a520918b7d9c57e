#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "rlhf/core/ids.h"
#include "rlhf/kernels/device_kernels.h"

namespace rlhf {

/// The tokens of one forward pass, without padding: row t is one token of some sequence.
struct Rows {
  std::vector<TokenId> tokens;              ///< [T]
  std::vector<std::int32_t> positions;      ///< [T] position inside its sequence
  std::vector<const std::int32_t*> tables;  ///< [T] block table of the row's sequence
  /// Further blocks that row t's K and V belong into: copies[copy_offsets[t]] .. [copy_offsets[t + 1]). Empty
  /// offsets: none for any row.
  std::vector<std::size_t> copy_offsets;
  std::vector<std::int32_t> copies;

  std::int64_t size() const { return static_cast<std::int64_t>(tokens.size()); }
  /// The same rows as kernels take them; valid while this object does not change.
  kernels::PassRows view() const;
};

/// Full sequences laid out for a pass that keeps nothing afterwards (scoring, training); positions count from
/// 0. Heads that sequences have in common are laid out once: a token's hidden state depends on the tokens
/// before it only, so outputs and gradients are those of separate sequences. Pairs share their prompt, the
/// samples of a group too, and chats their system message.
class PackedRows {
 public:
  /// What becomes of heads that sequences have in common; kSeparate is for comparisons.
  enum class Heads { kShared, kSeparate };
  /// @param sequences token sequences; empty ones are allowed and take no rows
  explicit PackedRows(const std::vector<std::span<const TokenId>>& sequences, Heads heads = Heads::kShared);
  PackedRows(const PackedRows&) = delete;  // rows point into tables_
  PackedRows& operator=(const PackedRows&) = delete;

  const Rows& rows() const { return rows_; }
  /// Row of a token; sequences with a common head have common rows.
  std::int64_t row(std::size_t sequence, std::int64_t position) const {
    return sequence_rows_[sequence][static_cast<std::size_t>(position)];
  }
  std::int64_t last_row(std::size_t sequence) const { return sequence_rows_[sequence].back(); }
  std::int64_t num_blocks() const { return num_blocks_; }
  /// The rows, grouped so that the block tables of different groups have no block in common.
  const std::vector<std::vector<std::int64_t>>& trees() const { return trees_; }
  /// The same groups, and which rows see which block, as kernels take them.
  kernels::RowTrees row_trees() const;
  kernels::BlockUses block_uses() const;

 private:
  Rows rows_;
  std::vector<std::vector<std::int64_t>> sequence_rows_;
  std::vector<std::vector<std::int32_t>> tables_;  ///< [sequences]
  std::vector<std::vector<std::int64_t>> trees_;
  std::vector<std::int64_t> tree_offsets_, tree_rows_;
  std::vector<std::int64_t> use_offsets_, use_ranges_;
  std::vector<std::int32_t> first_keys_;  ///< [blocks]
  std::int32_t num_blocks_ = 0;
};

/// Splits items of `sequences_per_item` consecutive sequences into passes of at most `max_rows` rows, common
/// heads counted once; an item with more rows gets a pass of its own. Items are taken in the order of their
/// first sequence's tokens, so that common heads meet. Returns item indices.
std::vector<std::vector<std::size_t>> split_into_passes(
    const std::vector<std::span<const TokenId>>& sequences, std::int64_t max_rows,
    std::size_t sequences_per_item = 1);

}  // namespace rlhf

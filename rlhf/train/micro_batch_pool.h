#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "rlhf/core/ids.h"

namespace rlhf {

/// Cuts the sequences of an optimizer step into micro-batches while they still arrive. Sequences with common
/// heads meet in one micro-batch as long as enough is left to choose from; when only stragglers are missing,
/// what is there is not held back. Depends on the sequences and their order alone, not on time, so that every
/// scheduling policy cuts the same micro-batches.
class MicroBatchPool {
 public:
  using Indices = std::vector<std::size_t>;

  /// @param max_rows rows of one micro-batch, common heads counted once
  /// @param num_sequences that will arrive
  MicroBatchPool(std::int64_t max_rows, std::size_t num_sequences)
      : max_rows_(max_rows), num_missing_(num_sequences) {}

  /// Adds sequences, named by indices of the caller; `num_skipped` more will not come. @return the
  /// micro-batches that are complete now; after the last sequence these are all the rest.
  std::vector<Indices> add(const Indices& indices, const std::vector<std::span<const TokenId>>& sequences,
                           std::size_t num_skipped = 0);

 private:
  std::vector<Indices> cut();

  std::int64_t max_rows_;
  std::size_t num_missing_, num_seen_ = 0, num_seen_tokens_ = 0;
  Indices indices_;
  std::vector<std::span<const TokenId>> sequences_;
};

}  // namespace rlhf

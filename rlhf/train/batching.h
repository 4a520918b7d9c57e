#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "rlhf/core/ids.h"
#include "rlhf/distributed/collective.h"

namespace rlhf {

/// A permutation of [0, count), a function of (seed, epoch): a resumed run sees the same order.
std::vector<std::size_t> epoch_order(std::size_t count, std::uint64_t seed, std::uint64_t epoch);

/// The order in which items are taken; every item once an epoch.
enum class ItemOrder {
  kShuffled,  ///< epoch_order
  kGiven,     ///< as they stand
};

/// The `count` items of step `step` when items are taken epoch after epoch.
std::vector<std::size_t> step_items(std::size_t num_items, std::size_t count, std::int64_t step,
                                    std::uint64_t seed, ItemOrder item_order = ItemOrder::kShuffled);

/// This rank's part of a step in passes as split_into_passes makes them: items are shared out over the ranks
/// by their tokens, each to one rank, the same way on all. One process has them all.
std::vector<std::vector<std::size_t>> own_passes(Collective& collective,
                                                 const std::vector<std::span<const TokenId>>& sequences,
                                                 std::int64_t max_rows, std::size_t sequences_per_item = 1);
/// The same for training, filled up with passes without items to the number of the rank that has most:
/// where they sum gradients inside backward, all ranks take part in every pass (SequencePass::skip_backward).
std::vector<std::vector<std::size_t>> own_training_passes(
    Collective& collective, const std::vector<std::span<const TokenId>>& sequences, std::int64_t max_rows,
    std::size_t sequences_per_item = 1);

}  // namespace rlhf

#include "rlhf/train/batching.h"

#include <algorithm>
#include <numeric>

#include "rlhf/core/error.h"
#include "rlhf/core/random.h"
#include "rlhf/distributed/balance.h"
#include "rlhf/model/packed_rows.h"

namespace rlhf {

std::vector<std::size_t> epoch_order(std::size_t count, std::uint64_t seed, std::uint64_t epoch) {
  std::vector<std::size_t> order(count);
  std::iota(order.begin(), order.end(), std::size_t{0});
  RandomStream random(seed, 0xe90c000000000000 + epoch);
  for (std::size_t i = count; i > 1; --i) std::swap(order[i - 1], order[random.below(i)]);
  return order;
}

std::vector<std::size_t> step_items(std::size_t num_items, std::size_t count, std::int64_t step,
                                    std::uint64_t seed, ItemOrder item_order) {
  RLHF_CHECK(num_items > 0, "step_items: there is no data");
  std::vector<std::size_t> items;
  std::uint64_t epoch = UINT64_MAX;
  std::vector<std::size_t> order;
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint64_t position = static_cast<std::uint64_t>(step) * count + i;
    if (item_order == ItemOrder::kGiven) {
      items.push_back(position % num_items);
      continue;
    }
    if (position / num_items != epoch) {
      epoch = position / num_items;
      order = epoch_order(num_items, seed, epoch);
    }
    items.push_back(order[position % num_items]);
  }
  return items;
}

std::vector<std::vector<std::size_t>> own_passes(Collective& collective,
                                                 const std::vector<std::span<const TokenId>>& sequences,
                                                 std::int64_t max_rows, std::size_t sequences_per_item) {
  if (collective.world_size() == 1) return split_into_passes(sequences, max_rows, sequences_per_item);
  std::vector<double> costs(sequences.size() / sequences_per_item);
  for (std::size_t s = 0; s < sequences.size(); ++s)
    costs[s / sequences_per_item] += static_cast<double>(sequences[s].size());
  const std::vector<int> ranks = balanced_shares(costs, collective.world_size());
  std::vector<std::size_t> items;
  std::vector<std::span<const TokenId>> own;
  for (std::size_t item = 0; item < ranks.size(); ++item) {
    if (ranks[item] != collective.rank()) continue;
    items.push_back(item);
    for (std::size_t k = 0; k < sequences_per_item; ++k)
      own.push_back(sequences[item * sequences_per_item + k]);
  }
  if (items.empty()) return {};
  std::vector<std::vector<std::size_t>> passes = split_into_passes(own, max_rows, sequences_per_item);
  for (auto& pass : passes)
    for (std::size_t& item : pass) item = items[item];
  return passes;
}

std::vector<std::vector<std::size_t>> own_training_passes(
    Collective& collective, const std::vector<std::span<const TokenId>>& sequences, std::int64_t max_rows,
    std::size_t sequences_per_item) {
  auto passes = own_passes(collective, sequences, max_rows, sequences_per_item);
  if (collective.world_size() == 1) return passes;
  std::vector<double> counts(static_cast<std::size_t>(collective.world_size()));
  counts[static_cast<std::size_t>(collective.rank())] = static_cast<double>(passes.size());
  collective.all_reduce(std::span(counts));
  passes.resize(static_cast<std::size_t>(std::ranges::max(counts)));
  return passes;
}

}  // namespace rlhf

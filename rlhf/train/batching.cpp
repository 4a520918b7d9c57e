#include "rlhf/train/batching.h"

#include <numeric>

#include "rlhf/core/error.h"
#include "rlhf/core/random.h"

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

}  // namespace rlhf

#include "rlhf/distributed/balance.h"

#include <algorithm>
#include <numeric>

namespace rlhf {

std::vector<int> balanced_shares(std::span<const double> costs, int world_size) {
  std::vector<std::size_t> order(costs.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::ranges::stable_sort(order, [&](std::size_t a, std::size_t b) { return costs[a] > costs[b]; });
  std::vector<double> loads(static_cast<std::size_t>(world_size));
  std::vector<int> ranks(costs.size());
  for (const std::size_t item : order) {
    const auto lightest = std::ranges::min_element(loads);
    *lightest += costs[item];
    ranks[item] = static_cast<int>(lightest - loads.begin());
  }
  return ranks;
}

}  // namespace rlhf

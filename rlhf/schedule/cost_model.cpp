#include "rlhf/schedule/cost_model.h"

#include <cmath>

namespace rlhf::schedule {

double NetworkModel::all_reduce_s(std::int64_t devices) const {
  if (devices <= 1) return 0;
  const auto n = static_cast<double>(devices);
  const double bytes_per_s = devices <= devices_per_node ? node_bytes_per_s : cluster_bytes_per_s;
  return 2 * (n - 1) / n * gradient_bytes / bytes_per_s + hop_s * std::ceil(std::log2(n));
}

}  // namespace rlhf::schedule

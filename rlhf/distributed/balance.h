#pragma once

#include <cstddef>
#include <span>
#include <vector>

namespace rlhf {

/// Divides items over ranks so that the sums of their costs differ little: the costliest first, each to the
/// rank that has least (Graham 1969: at most 4/3 of the best). A function of the costs alone.
/// @return the rank of each item
std::vector<int> balanced_shares(std::span<const double> costs, int world_size);

}  // namespace rlhf

#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace rlhf::config {

/// Number of insertions, deletions, substitutions and swaps of neighbours that turn `a` into `b`
/// (optimal string alignment distance).
std::size_t edit_distance(std::string_view a, std::string_view b);

/// Returns the candidate closest to `word`, the earlier one on a tie, or "" when there are no candidates.
std::string nearest(std::string_view word, const std::vector<std::string>& candidates);

}  // namespace rlhf::config

#pragma once

#include <cstddef>
#include <cstdint>

namespace rlhf {

/// Index into a model's vocabulary.
using TokenId = std::int32_t;
/// Identifies a prompt within a run; an input of the counter-based draws, so it must be stable across
/// restarts.
using PromptId = std::uint64_t;
/// Number of optimizer steps behind a set of weights. Weights as loaded have version 0.
using WeightVersion = std::int64_t;

/// A count or index, which is signed in interfaces, for the containers' unsigned sizes.
constexpr std::size_t to_size(std::int64_t n) {
  return static_cast<std::size_t>(n);
}

}  // namespace rlhf

#pragma once

#include <cstdint>
#include <functional>
#include <span>

#include "rlhf/core/ids.h"

namespace rlhf {

/// One token whose log-probability is asked: the hidden state of `row` predicts `target`.
struct TokenTarget {
  std::int64_t row = 0;
  TokenId target = 0;
};

/// Gets the log-probabilities [V] at temperature 1 of row `i` of those asked and sets `gradient` [V], d loss
/// / d logits. Called for several rows at once, from the threads of the pass.
template <class V>
using DistributionGradient =
    std::function<void(std::size_t i, std::span<const V> log_probs, std::span<V> gradient)>;

}  // namespace rlhf

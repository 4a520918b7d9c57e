#pragma once

// Internal to PpoIteration: the rows of a pass over some of its responses.

#include <cstddef>
#include <span>
#include <vector>

#include "rlhf/model/packed_rows.h"
#include "rlhf/train/ppo_iteration.h"

namespace rlhf {

// An index as an offset of an iterator.
inline std::ptrdiff_t at(std::size_t index) {
  return static_cast<std::ptrdiff_t>(index);
}

// The rows of some responses, and which of them predict response tokens.
struct PpoIteration::Pass {
  PackedRows rows;
  std::vector<TokenTarget> targets;  // every response token, response by response

  Pass(const std::vector<PpoResponse>& all, const Indices& samples)
      : rows([&] {
          std::vector<std::span<const TokenId>> sequences;
          for (std::size_t i : samples) sequences.push_back(all[i].tokens);
          return sequences;
        }()) {
    for (std::size_t s = 0; s < samples.size(); ++s) {
      const PpoResponse& response = all[samples[s]];
      for (std::size_t t = 0; t < response.sample.tokens.size(); ++t)
        targets.push_back({rows.row(s, response.predictor(t)), response.sample.tokens[t]});
    }
  }
};

}  // namespace rlhf

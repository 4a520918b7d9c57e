#pragma once

// Internal to PpoIteration: the rows of a pass over some of its responses.

#include <algorithm>
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
 private:
  using Sequences = std::vector<std::vector<TokenId>>;
  Sequences sequences_;

 public:
  PackedRows rows;
  std::vector<TokenTarget> targets;  // every response token, response by response

  // Padded: all as long as the longest response of `all`. What pads comes behind all that is read.
  Pass(const std::vector<PpoResponse>& all, const Indices& samples, bool padded)
      : sequences_(copy(all, samples, padded)),
        rows({sequences_.begin(), sequences_.end()},
             padded ? PackedRows::Heads::kSeparate : PackedRows::Heads::kShared) {
    for (std::size_t s = 0; s < samples.size(); ++s) {
      const PpoResponse& response = all[samples[s]];
      for (std::size_t t = 0; t < response.sample.tokens.size(); ++t)
        targets.push_back({rows.row(s, response.predictor(t)), response.sample.tokens[t]});
    }
  }

 private:
  static Sequences copy(const std::vector<PpoResponse>& all, const Indices& samples, bool padded) {
    std::size_t longest = 0;
    for (const PpoResponse& response : all) longest = std::max(longest, response.tokens.size());
    Sequences sequences;
    for (std::size_t i : samples) {
      sequences.push_back(all[i].tokens);
      if (padded) sequences.back().resize(longest);
    }
    return sequences;
  }
};

}  // namespace rlhf

#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "rlhf/core/ids.h"

namespace rlhf {

/// Guesses how a text goes on from the texts it has seen: after the same last tokens, what came most recently
/// (LOOKAHEAD, Zhao et al. 2024, as a table of n-grams in place of a trie). It also learns how often its
/// guesses are right, by the length of the context they rest on. Memory is fixed; texts overwrite each other.
/// A pure function of the calls made, so runs repeat.
class Lookahead {
 public:
  /// A guessed token and how likely it is to be right, given that those before it are.
  struct Guess {
    TokenId token = 0;
    double chance = 0;
    std::uint8_t order = 0;  ///< which context length it rests on; for `judge`
  };

  /// @param log2_entries the table takes 12 bytes x 2^log2_entries
  explicit Lookahead(int log2_entries = 16);

  /// Learns the tokens from index `from` on, in the context of those before.
  void add(std::span<const TokenId> tokens, std::size_t from);
  /// Appends up to `count` guesses for what follows `tokens`, while there are any.
  void guess(std::span<const TokenId> tokens, std::size_t count, std::vector<Guess>& guesses);
  /// Tells whether a guess whose predecessors were right was itself right.
  void judge(const Guess& guess, bool right);

 private:
  static constexpr std::array<std::size_t, 4> kContexts = {8, 5, 3, 2};  // longest first
  struct Entry {
    std::uint64_t key = 0;  // 0 = empty
    TokenId next = 0;
  };

  static std::uint64_t key_of(std::span<const TokenId> context);
  Entry& entry(std::uint64_t key) { return entries_[key & (entries_.size() - 1)]; }

  std::vector<Entry> entries_;
  std::array<double, kContexts.size()> chance_{};
  std::vector<TokenId> text_;  // of the guess being made
};

}  // namespace rlhf

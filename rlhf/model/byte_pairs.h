#pragma once

#include <array>
#include <cstdint>
#include <shared_mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "rlhf/core/ids.h"
#include "rlhf/model/tokenizer_spec.h"

namespace rlhf {

/// Lets std::unordered_map<std::string, ...> be searched by string_view.
struct TransparentHash {
  using is_transparent = void;
  std::size_t operator()(std::string_view text) const { return std::hash<std::string_view>()(text); }
};
template <typename T>
using TextMap = std::unordered_map<std::string, T, TransparentHash, std::equal_to<>>;

/// Byte-pair encoding of one pre-token (Sennrich et al., 2016): joins the neighbouring pair of lowest rank,
/// leftmost first, until no pair is in the merge table. Thread-safe; keeps a bounded cache of words.
class BytePairEncoder {
 public:
  /// @param ids the vocabulary, token text -> id. @throws IoError for merges outside the vocabulary.
  BytePairEncoder(const TokenizerSpec& spec, const TextMap<TokenId>& ids);

  /// Appends the ids of `word` (raw bytes, not the vocabulary's spelling). Returns how many bytes had no
  /// token and were left out.
  std::size_t encode(std::string_view word, std::vector<TokenId>& out) const;

  /// -1 for a byte without a token.
  const std::array<TokenId, 256>& byte_ids() const { return byte_ids_; }

 private:
  struct Merge {
    std::int32_t rank = -1;
    TokenId id = -1;
  };
  struct Slot {
    std::uint64_t pair = 0;
    Merge merge;
  };
  struct Word {
    std::vector<TokenId> ids;
    std::size_t dropped = 0;
  };

  void add_merge(TokenId left, TokenId right, Merge merge);
  Merge find_merge(TokenId left, TokenId right) const;
  Word split_into_bytes(std::string_view word) const;
  void apply_merges(std::vector<TokenId>& symbols) const;

  std::array<TokenId, 256> byte_ids_{};
  TokenId unknown_ = -1;
  bool fuse_unknown_ = false;
  // Open addressing with linear probing; the size is a power of two, at most half full.
  std::vector<Slot> merges_;
  TextMap<TokenId> whole_words_;

  mutable std::shared_mutex cache_mutex_;
  mutable TextMap<Word> cache_;
};

}  // namespace rlhf

#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <optional>
#include <span>
#include <vector>

#include "rlhf/core/ids.h"

namespace rlhf {

/// Bookkeeping of K/V blocks: reference counts, prefix reuse and eviction. Holds no tensors; not thread-safe.
///
/// A block that is full of prompt tokens can be published: later sequences with the same tokens so far find
/// it with `match` and share it. A published block that nobody references stays until memory is needed and is
/// then evicted, least recently used first. Unpublished blocks are free as soon as their last reference goes.
class BlockCache {
 public:
  BlockCache(std::int32_t num_blocks, std::int32_t block_tokens);

  std::int32_t num_blocks() const { return static_cast<std::int32_t>(blocks_.size()); }
  /// Blocks that allocate() could hand out now: free ones and evictable ones.
  std::int32_t num_available() const { return static_cast<std::int32_t>(free_.size() + evictable_.size()); }
  std::int32_t references(std::int32_t block) const {
    return blocks_[static_cast<std::size_t>(block)].references;
  }

  /// A block with one reference, evicting an unreferenced published block if needed; nothing when all are in
  /// use.
  std::optional<std::int32_t> try_allocate();
  void add_reference(std::int32_t block);
  /// Gives references back, last block first, so that the tail of a prefix is evicted before its head.
  void release(std::span<const std::int32_t> blocks);

  /// Longest published prefix of `tokens` in whole blocks; adds a reference to each block returned.
  std::vector<std::int32_t> match(std::span<const TokenId> tokens);
  /// Publishes `block`, which holds the `block_tokens` tokens that follow the published `parent` (none for
  /// the first block). Does nothing when an equal block is published already.
  void publish(std::int32_t block, std::optional<std::int32_t> parent, std::span<const TokenId> tokens);
  /// Forgets all published blocks: the weights changed. Referenced blocks stay valid for their holders.
  void forget_published();

  std::int64_t num_hit_tokens() const { return num_hit_tokens_; }
  /// Checks the invariants. @throws InternalError.
  void check() const;

 private:
  struct Key {
    std::int64_t parent;  ///< node id of the block before, 0 at the start
    std::vector<TokenId> tokens;
    auto operator<=>(const Key&) const = default;
  };
  struct Block {
    std::int32_t references = 0;
    std::int64_t node =
        0;  ///< unique id while published; ids are never reused, so a stale parent matches nothing
    std::optional<std::list<std::int32_t>::iterator> lru;
    Key key;
  };

  void unpublish(std::int32_t block);

  std::int32_t block_tokens_;
  std::vector<Block> blocks_;
  std::vector<std::int32_t> free_;
  std::list<std::int32_t> evictable_;  ///< least recently used first
  std::map<Key, std::int32_t> published_;
  std::int64_t next_node_ = 1;
  std::int64_t num_hit_tokens_ = 0;
};

}  // namespace rlhf

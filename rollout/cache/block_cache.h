#pragma once

#include <algorithm>
#include <cstdint>
#include <list>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <vector>

#include "rlhf/core/ids.h"

namespace rlhf {

/// Bookkeeping of K/V blocks: reference counts, prefix reuse, eviction and a limit that may move. Holds no
/// tensors; not thread-safe.
///
/// A full block can be published: later sequences with the same tokens so far find it with `match` and share
/// it. Published blocks form a radix tree, one edge a block: a *node* stands for all tokens up to the end of
/// its block. A published block that nobody references stays until memory is needed and is then evicted,
/// least recently used first. Unpublished blocks are free as soon as their last reference goes.
class BlockCache {
 public:
  /// Node of the radix tree; ids are never reused, so an evicted node matches nothing.
  using NodeId = std::int64_t;
  static constexpr NodeId kRoot = 0;

  BlockCache(std::int32_t num_blocks, std::int32_t block_tokens);

  std::int32_t num_blocks() const { return static_cast<std::int32_t>(blocks_.size()); }
  /// Blocks that try_allocate() could hand out now: free ones and evictable ones.
  std::int32_t num_available() const {
    return std::max(0, limit_ - num_held() + static_cast<std::int32_t>(evictable_.size()));
  }
  std::int32_t references(std::int32_t block) const { return at(block).references; }

  /// Lets at most `limit` blocks, 0 to num_blocks, hold anything. Idle blocks are evicted at once, referenced
  /// ones go when they are released: until then `excess` is positive.
  void set_limit(std::int32_t limit);
  std::int32_t limit() const { return limit_; }
  /// Referenced blocks beyond the limit.
  std::int32_t excess() const { return std::max(0, num_held() - limit_); }
  struct Move {
    std::int32_t from, to;  ///< blocks
  };
  /// Renames blocks so that only the first `limit` hold anything. The caller copies what they hold, and
  /// renames them wherever it has kept them. @throws InvalidArgument while there is an excess
  std::vector<Move> compact();

  /// The first free block, with one reference, evicting an unreferenced published block if needed; nothing
  /// when all are in use. Below the limit, once compact() was called.
  std::optional<std::int32_t> try_allocate();
  void add_reference(std::int32_t block);
  /// Gives references back, last block first, so that the tail of a prefix is evicted before its head.
  void release(std::span<const std::int32_t> blocks);

  /// Longest published prefix of `tokens` in whole blocks; adds a reference to each block returned.
  std::vector<std::int32_t> match(std::span<const TokenId> tokens);
  /// Node of a published block, kRoot of any other.
  NodeId node(std::int32_t block) const { return at(block).node; }
  /// Publishes `block`, which holds the `block_tokens` tokens that follow those of `parent`. @return its
  /// node, or that of an equal block that is published already; `block` then stays private.
  NodeId publish(std::int32_t block, NodeId parent, std::span<const TokenId> tokens);
  /// Forgets all published blocks: the weights changed. Referenced blocks stay valid for their holders.
  void forget_published();

  std::int64_t num_hit_tokens() const { return num_hit_tokens_; }
  std::int64_t num_evictions() const { return num_evictions_; }
  /// Checks the invariants. @throws InternalError.
  void check() const;

 private:
  struct Key {
    NodeId parent;
    std::vector<TokenId> tokens;
    auto operator<=>(const Key&) const = default;
  };
  struct Block {
    std::int32_t references = 0;
    NodeId node = kRoot;  ///< while published
    std::optional<std::list<std::int32_t>::iterator> lru;
    Key key;
  };

  const Block& at(std::int32_t block) const { return blocks_[static_cast<std::size_t>(block)]; }
  Block& at(std::int32_t block) { return blocks_[static_cast<std::size_t>(block)]; }
  /// Blocks that hold something: referenced or evictable ones.
  std::int32_t num_held() const { return num_blocks() - static_cast<std::int32_t>(free_.size()); }
  void unpublish(std::int32_t block);

  std::int32_t block_tokens_;
  std::int32_t limit_;
  std::vector<Block> blocks_;
  std::set<std::int32_t> free_;
  std::list<std::int32_t> evictable_;  ///< least recently used first
  std::map<Key, std::int32_t> published_;
  NodeId next_node_ = kRoot + 1;
  std::int64_t num_hit_tokens_ = 0, num_evictions_ = 0;
};

}  // namespace rlhf

#include "rollout/cache/block_cache.h"

#include <algorithm>
#include <utility>

#include "rlhf/core/error.h"

namespace rlhf {

BlockCache::BlockCache(std::int32_t num_blocks, std::int32_t block_tokens)
    : block_tokens_(block_tokens), limit_(num_blocks) {
  RLHF_CHECK(num_blocks >= 0 && block_tokens > 0, "BlockCache: ", num_blocks, " blocks of ", block_tokens,
             " tokens");
  blocks_.resize(static_cast<std::size_t>(num_blocks));
  for (std::int32_t b = 0; b < num_blocks; ++b) free_.insert(b);
}

void BlockCache::set_limit(std::int32_t limit) {
  RLHF_CHECK(limit >= 0 && limit <= num_blocks(), "BlockCache: a limit of ", limit, " blocks, expected 0 to ",
             num_blocks());
  limit_ = limit;
  while (excess() > 0 && !evictable_.empty()) unpublish(evictable_.front());
}

std::vector<BlockCache::Move> BlockCache::compact() {
  RLHF_CHECK(excess() == 0, "BlockCache: ", excess(), " referenced blocks are beyond the limit");
  std::vector<Move> moves;
  for (std::int32_t from = limit_; from < num_blocks(); ++from) {
    if (free_.contains(from)) continue;
    const std::int32_t to = *free_.begin();
    at(to) = std::exchange(at(from), {});
    if (node(to) != kRoot) published_.at(at(to).key) = to;
    if (at(to).lru) **at(to).lru = to;
    free_.erase(to);
    free_.insert(from);
    moves.push_back({from, to});
  }
  return moves;
}

std::optional<std::int32_t> BlockCache::try_allocate() {
  if (num_available() == 0) return std::nullopt;
  if (num_held() == limit_) {
    ++num_evictions_;
    unpublish(evictable_.front());
  }
  const std::int32_t block = *free_.begin();
  free_.erase(free_.begin());
  at(block).references = 1;
  return block;
}

void BlockCache::add_reference(std::int32_t block) {
  Block& entry = at(block);
  if (entry.references == 0) {
    RLHF_CHECK(entry.lru.has_value(), "BlockCache: reference to free block ", block);
    evictable_.erase(*entry.lru);
    entry.lru.reset();
  }
  ++entry.references;
}

void BlockCache::release(std::span<const std::int32_t> blocks) {
  for (std::size_t i = blocks.size(); i-- > 0;) {
    Block& entry = at(blocks[i]);
    RLHF_CHECK(entry.references > 0, "BlockCache: block ", blocks[i], " released more often than referenced");
    if (--entry.references > 0) continue;
    if (entry.node != kRoot) {
      entry.lru = evictable_.insert(evictable_.end(), blocks[i]);
      if (excess() > 0) unpublish(blocks[i]);
    } else {
      free_.insert(blocks[i]);
    }
  }
}

std::vector<std::int32_t> BlockCache::match(std::span<const TokenId> tokens) {
  std::vector<std::int32_t> found;
  NodeId parent = kRoot;
  const auto width = static_cast<std::size_t>(block_tokens_);
  for (std::size_t begin = 0; begin + width <= tokens.size(); begin += width) {
    const auto part = tokens.subspan(begin, width);
    const auto entry = published_.find(Key{parent, {part.begin(), part.end()}});
    if (entry == published_.end()) break;
    add_reference(entry->second);
    found.push_back(entry->second);
    parent = node(entry->second);
  }
  num_hit_tokens_ += static_cast<std::int64_t>(found.size()) * block_tokens_;
  return found;
}

BlockCache::NodeId BlockCache::publish(std::int32_t block, NodeId parent, std::span<const TokenId> tokens) {
  RLHF_CHECK(static_cast<std::int32_t>(tokens.size()) == block_tokens_, "BlockCache: published block of ",
             tokens.size(), " tokens, expected ", block_tokens_);
  Block& entry = at(block);
  RLHF_CHECK(entry.references > 0, "BlockCache: published block ", block, " is not referenced");
  RLHF_CHECK(entry.node == kRoot, "BlockCache: block ", block, " is published already");
  Key key{parent, {tokens.begin(), tokens.end()}};
  const auto [place, is_new] = published_.emplace(key, block);
  if (!is_new) return node(place->second);
  entry.node = next_node_++;
  entry.key = std::move(key);
  return entry.node;
}

void BlockCache::unpublish(std::int32_t block) {
  Block& entry = at(block);
  published_.erase(entry.key);
  entry.node = kRoot;
  entry.key = {};
  if (entry.lru) {
    evictable_.erase(*entry.lru);
    entry.lru.reset();
    free_.insert(block);
  }
}

void BlockCache::forget_published() {
  for (std::int32_t b = 0; b < num_blocks(); ++b)
    if (node(b) != kRoot) unpublish(b);
}

void BlockCache::check() const {
  const auto in_use = static_cast<std::size_t>(
      std::ranges::count_if(blocks_, [](const Block& b) { return b.references > 0; }));
  if (in_use + free_.size() + evictable_.size() != blocks_.size())
    fail<InternalError>("BlockCache: ", in_use, " used + ", free_.size(), " free + ", evictable_.size(),
                        " evictable != ", blocks_.size(), " blocks");
  if (num_held() > limit_ && !evictable_.empty())
    fail<InternalError>("BlockCache: ", evictable_.size(), " idle blocks although ", num_held(),
                        " blocks exceed the limit of ", limit_);
  for (std::int32_t block : free_)
    if (references(block) != 0 || node(block) != kRoot)
      fail<InternalError>("BlockCache: free block ", block, " is in use or published");
  for (std::int32_t block : evictable_)
    if (references(block) != 0 || node(block) == kRoot)
      fail<InternalError>("BlockCache: evictable block ", block, " is in use or not published");
  for (const auto& [key, block] : published_)
    if (node(block) == kRoot || at(block).key != key)
      fail<InternalError>("BlockCache: published block ", block, " has another node");
}

}  // namespace rlhf

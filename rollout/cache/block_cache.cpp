#include "rollout/cache/block_cache.h"

#include <algorithm>

#include "rlhf/core/error.h"

namespace rlhf {

BlockCache::BlockCache(std::int32_t num_blocks, std::int32_t block_tokens)
    : block_tokens_(block_tokens), limit_(num_blocks) {
  RLHF_CHECK(num_blocks >= 0 && block_tokens > 0, "BlockCache: ", num_blocks, " blocks of ", block_tokens,
             " tokens");
  blocks_.resize(static_cast<std::size_t>(num_blocks));
  for (std::int32_t b = num_blocks - 1; b >= 0; --b) free_.push_back(b);
}

void BlockCache::set_limit(std::int32_t limit) {
  RLHF_CHECK(limit >= 0 && limit <= num_blocks(), "BlockCache: a limit of ", limit, " blocks, expected 0 to ",
             num_blocks());
  limit_ = limit;
  while (num_live() < limit_) {
    free_.push_back(retired_.back());
    retired_.pop_back();
  }
  num_retired_taken_ = std::min(num_retired_taken_, retired_.size());
  while (excess() > 0 && !free_.empty()) {
    retired_.push_back(free_.back());
    free_.pop_back();
  }
  while (excess() > 0 && !evictable_.empty()) unpublish(evictable_.front());
}

std::int32_t BlockCache::excess() const {
  return std::max(0, num_live() - limit_);
}

std::vector<std::int32_t> BlockCache::take_retired() {
  std::vector<std::int32_t> taken(retired_.begin() + static_cast<std::ptrdiff_t>(num_retired_taken_),
                                  retired_.end());
  num_retired_taken_ = retired_.size();
  return taken;
}

std::optional<std::int32_t> BlockCache::try_allocate() {
  if (free_.empty()) {
    if (evictable_.empty()) return std::nullopt;
    ++num_evictions_;
    unpublish(evictable_.front());
  }
  const std::int32_t block = free_.back();
  free_.pop_back();
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
      put_away(blocks[i]);
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

// A block that holds nothing any more: free, or retired when there are too many.
void BlockCache::put_away(std::int32_t block) {
  (excess() > 0 ? retired_ : free_).push_back(block);
}

void BlockCache::unpublish(std::int32_t block) {
  Block& entry = at(block);
  published_.erase(entry.key);
  entry.node = kRoot;
  entry.key = {};
  if (entry.lru) {
    evictable_.erase(*entry.lru);
    entry.lru.reset();
    put_away(block);
  }
}

void BlockCache::forget_published() {
  for (std::int32_t b = 0; b < num_blocks(); ++b)
    if (node(b) != kRoot) unpublish(b);
}

void BlockCache::check() const {
  const auto in_use = static_cast<std::size_t>(
      std::ranges::count_if(blocks_, [](const Block& b) { return b.references > 0; }));
  if (in_use + free_.size() + evictable_.size() + retired_.size() != blocks_.size())
    fail<InternalError>("BlockCache: ", in_use, " used + ", free_.size(), " free + ", evictable_.size(),
                        " evictable + ", retired_.size(), " retired != ", blocks_.size(), " blocks");
  if (num_live() > limit_ && num_available() > 0)
    fail<InternalError>("BlockCache: ", num_available(), " idle blocks although ", num_live(),
                        " live blocks exceed the limit of ", limit_);
  for (const auto* idle : {&free_, &retired_})
    for (std::int32_t block : *idle)
      if (references(block) != 0 || node(block) != kRoot)
        fail<InternalError>("BlockCache: idle block ", block, " is in use or published");
  for (std::int32_t block : evictable_)
    if (references(block) != 0 || node(block) == kRoot)
      fail<InternalError>("BlockCache: evictable block ", block, " is in use or not published");
  for (const auto& [key, block] : published_)
    if (node(block) == kRoot || at(block).key != key)
      fail<InternalError>("BlockCache: published block ", block, " has another node");
}

}  // namespace rlhf

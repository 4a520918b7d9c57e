#include "rollout/cache/block_cache.h"

#include "rlhf/core/error.h"

namespace rlhf {

BlockCache::BlockCache(std::int32_t num_blocks, std::int32_t block_tokens) : block_tokens_(block_tokens) {
  RLHF_CHECK(num_blocks >= 0 && block_tokens > 0, "BlockCache: ", num_blocks, " blocks of ", block_tokens,
             " tokens");
  blocks_.resize(static_cast<std::size_t>(num_blocks));
  for (std::int32_t b = num_blocks - 1; b >= 0; --b) free_.push_back(b);
}

std::optional<std::int32_t> BlockCache::try_allocate() {
  if (free_.empty()) {
    if (evictable_.empty()) return std::nullopt;
    unpublish(evictable_.front());
  }
  const std::int32_t block = free_.back();
  free_.pop_back();
  blocks_[static_cast<std::size_t>(block)].references = 1;
  return block;
}

void BlockCache::add_reference(std::int32_t block) {
  Block& entry = blocks_[static_cast<std::size_t>(block)];
  if (entry.references == 0) {
    RLHF_CHECK(entry.lru.has_value(), "BlockCache: reference to free block ", block);
    evictable_.erase(*entry.lru);
    entry.lru.reset();
  }
  ++entry.references;
}

void BlockCache::release(std::span<const std::int32_t> blocks) {
  for (std::size_t i = blocks.size(); i-- > 0;) {
    Block& entry = blocks_[static_cast<std::size_t>(blocks[i])];
    RLHF_CHECK(entry.references > 0, "BlockCache: block ", blocks[i], " released more often than referenced");
    if (--entry.references > 0) continue;
    if (entry.node == 0)
      free_.push_back(blocks[i]);
    else
      entry.lru = evictable_.insert(evictable_.end(), blocks[i]);
  }
}

std::vector<std::int32_t> BlockCache::match(std::span<const TokenId> tokens) {
  std::vector<std::int32_t> found;
  std::int64_t parent = 0;
  const auto width = static_cast<std::size_t>(block_tokens_);
  for (std::size_t begin = 0; begin + width <= tokens.size(); begin += width) {
    const auto part = tokens.subspan(begin, width);
    const auto entry = published_.find(Key{parent, {part.begin(), part.end()}});
    if (entry == published_.end()) break;
    add_reference(entry->second);
    found.push_back(entry->second);
    parent = blocks_[static_cast<std::size_t>(entry->second)].node;
  }
  num_hit_tokens_ += static_cast<std::int64_t>(found.size()) * block_tokens_;
  return found;
}

void BlockCache::publish(std::int32_t block, std::optional<std::int32_t> parent,
                         std::span<const TokenId> tokens) {
  RLHF_CHECK(static_cast<std::int32_t>(tokens.size()) == block_tokens_, "BlockCache: published block of ",
             tokens.size(), " tokens, expected ", block_tokens_);
  Block& entry = blocks_[static_cast<std::size_t>(block)];
  RLHF_CHECK(entry.references > 0, "BlockCache: published block ", block, " is not referenced");
  std::int64_t parent_node = 0;
  if (parent) {
    parent_node = blocks_[static_cast<std::size_t>(*parent)].node;
    if (parent_node == 0)
      return;  // an equal parent was published by another sequence: this chain stays private
  }
  if (entry.node != 0) return;
  Key key{parent_node, {tokens.begin(), tokens.end()}};
  if (!published_.emplace(key, block).second) return;
  entry.node = next_node_++;
  entry.key = std::move(key);
}

void BlockCache::unpublish(std::int32_t block) {
  Block& entry = blocks_[static_cast<std::size_t>(block)];
  published_.erase(entry.key);
  entry.node = 0;
  entry.key = {};
  if (entry.lru) {
    evictable_.erase(*entry.lru);
    entry.lru.reset();
    free_.push_back(block);
  }
}

void BlockCache::forget_published() {
  for (std::size_t b = 0; b < blocks_.size(); ++b)
    if (blocks_[b].node != 0) unpublish(static_cast<std::int32_t>(b));
}

void BlockCache::check() const {
  std::size_t in_use = 0;
  for (const Block& block : blocks_) in_use += block.references > 0;
  if (in_use + free_.size() + evictable_.size() != blocks_.size())
    fail<InternalError>("BlockCache: ", in_use, " used + ", free_.size(), " free + ", evictable_.size(),
                        " evictable != ", blocks_.size(), " blocks");
  for (std::int32_t block : free_)
    if (references(block) != 0 || blocks_[static_cast<std::size_t>(block)].node != 0)
      fail<InternalError>("BlockCache: free block ", block, " is in use or published");
  for (const auto& [key, block] : published_)
    if (blocks_[static_cast<std::size_t>(block)].node == 0)
      fail<InternalError>("BlockCache: published block ", block, " has no node");
}

}  // namespace rlhf

// The block cache against a model that remembers what every block holds, under random operations.
#include "rollout/cache/block_cache.h"

#include <algorithm>
#include <map>
#include <span>

#include "rlhf/core/error.h"
#include "rlhf/core/random.h"
#include "tests/catch.h"

using namespace rlhf;

namespace {

constexpr std::int32_t kBlocks = 14, kWidth = 2;
using Tokens = std::vector<TokenId>;

// The definition: publishing gives a block the tokens up to its end, from a chain of nodes that begins at the
// root. A block is found as long as every node of its chain is that of a block still published.
class Model {
 public:
  using NodeId = BlockCache::NodeId;
  struct Entry {
    int references = 0;
    NodeId node = BlockCache::kRoot;
    std::int64_t idle_since = 0;  // when the last reference went
  };
  struct Node {
    NodeId parent = BlockCache::kRoot;
    Tokens prefix;  // all tokens up to its end
  };
  std::vector<Entry> blocks = std::vector<Entry>(kBlocks);
  std::map<NodeId, Node> nodes;
  std::int64_t clock = 0;

  int available() const {
    return static_cast<int>(std::ranges::count_if(blocks, [](const Entry& b) { return b.references == 0; }));
  }
  std::optional<std::int32_t> block_of(NodeId node) const {
    for (std::int32_t b = 0; b < kBlocks; ++b)
      if (blocks[static_cast<std::size_t>(b)].node == node) return b;
    return std::nullopt;
  }
  bool is_live(NodeId node) const {
    return node == BlockCache::kRoot || (block_of(node) && is_live(nodes.at(node).parent));
  }
  std::vector<std::int32_t> longest_match(const Tokens& tokens) const {
    std::vector<std::int32_t> found;
    for (std::size_t end = kWidth; end <= tokens.size(); end += kWidth) {
      std::optional<std::int32_t> next;
      for (std::int32_t b = 0; b < kBlocks; ++b) {
        const NodeId node = blocks[static_cast<std::size_t>(b)].node;
        if (node != BlockCache::kRoot && is_live(node) &&
            nodes.at(node).prefix ==
                Tokens(tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(end)))
          next = b;
      }
      if (!next) break;
      found.push_back(*next);
    }
    return found;
  }
};

// A user of blocks: a sequence that was matched and allocated, and may have been published.
struct Holder {
  Tokens tokens;
  std::vector<std::int32_t> blocks;
  std::vector<BlockCache::NodeId> nodes;  // of the first blocks
};

}  // namespace

TEST_CASE("random operations keep the block cache equal to its model (seeds 1 to 6)") {
  for (std::uint64_t seed = 1; seed <= 6; ++seed) {
    RandomStream random(seed);
    BlockCache cache(kBlocks, kWidth);
    Model model;
    std::vector<Holder> holders;
    std::int64_t hits = 0, evictions = 0, matched_blocks = 0;
    const auto entry = [&](std::int32_t b) -> Model::Entry& {
      return model.blocks[static_cast<std::size_t>(b)];
    };
    for (int round = 0; round < 4000; ++round) {
      ++model.clock;
      INFO("seed " << seed << ", round " << round);
      // Few sequences at a time: blocks are idle, found again, and evicted.
      switch (holders.size() > 4 ? 7 : random.below(10)) {
        case 0:
        case 1:
        case 2:
        case 3: {  // a new sequence, like a request that is admitted
          Holder holder;
          for (std::uint64_t i = 0, n = kWidth * (1 + random.below(4)) + random.below(2); i < n; ++i)
            holder.tokens.push_back(static_cast<TokenId>(random.below(2)));
          const auto expected = model.longest_match(holder.tokens);
          holder.blocks = cache.match(holder.tokens);
          REQUIRE(holder.blocks == expected);
          matched_blocks += static_cast<std::int64_t>(expected.size());
          hits += static_cast<std::int64_t>(expected.size()) * kWidth;
          for (std::int32_t b : holder.blocks) {
            ++entry(b).references;
            holder.nodes.push_back(cache.node(b));
          }
          const std::size_t total = (holder.tokens.size() + kWidth - 1) / kWidth;
          while (holder.blocks.size() < total) {
            const auto block = cache.try_allocate();
            REQUIRE(block.has_value() == (model.available() > 0));
            if (!block) break;
            Model::Entry& taken = entry(*block);
            REQUIRE(taken.references == 0);
            if (taken.node != BlockCache::kRoot) {
              ++evictions;
              // Only when nothing is free, and then the one that has been idle longest.
              for (const auto& other : model.blocks)
                if (other.references == 0) {
                  REQUIRE(other.node != BlockCache::kRoot);
                  REQUIRE(other.idle_since >= taken.idle_since);
                }
            }
            taken = {};
            taken.references = 1;
            holder.blocks.push_back(*block);
          }
          holders.push_back(std::move(holder));
          break;
        }
        case 4:
        case 5: {  // publish the full blocks of a sequence, as after its prefill
          if (holders.empty()) break;
          Holder& holder = holders[random.below(holders.size())];
          while (holder.nodes.size() < holder.blocks.size() &&
                 (holder.nodes.size() + 1) * kWidth <= holder.tokens.size()) {
            const std::size_t i = holder.nodes.size();
            const auto parent = i == 0 ? BlockCache::kRoot : holder.nodes.back();
            const auto part = std::span<const TokenId>(holder.tokens).subspan(i * kWidth, kWidth);
            // A copy of another holder may have published the very same block.
            if (cache.node(holder.blocks[i]) != BlockCache::kRoot) break;
            const auto node = cache.publish(holder.blocks[i], parent, part);
            holder.nodes.push_back(node);
            const Tokens prefix(holder.tokens.begin(),
                                holder.tokens.begin() + static_cast<std::ptrdiff_t>((i + 1) * kWidth));
            if (const auto equal = model.nodes.find(node); equal != model.nodes.end()) {
              REQUIRE(model.block_of(node));
              REQUIRE(equal->second.prefix == prefix);
              REQUIRE(equal->second.parent == parent);
              continue;
            }
            model.nodes[node] = {parent, prefix};
            entry(holder.blocks[i]).node = node;
          }
          break;
        }
        case 6: {  // another sample of the same prompt
          if (holders.empty()) break;
          Holder copy = holders[random.below(holders.size())];
          for (std::int32_t b : copy.blocks) {
            cache.add_reference(b);
            ++entry(b).references;
          }
          holders.push_back(std::move(copy));
          break;
        }
        case 7:
        case 8: {  // a sequence ends
          if (holders.empty()) break;
          const std::size_t which = random.below(holders.size());
          cache.release(holders[which].blocks);
          for (std::size_t i = holders[which].blocks.size(); i-- > 0;) {
            Model::Entry& b = entry(holders[which].blocks[i]);
            if (--b.references == 0) b.idle_since = ++model.clock;
          }
          holders.erase(holders.begin() + static_cast<std::ptrdiff_t>(which));
          break;
        }
        case 9:  // new weights, now and then
          if (random.below(20) != 0) break;
          cache.forget_published();
          for (auto& b : model.blocks) b.node = BlockCache::kRoot;
          // As in the engine: what runs on is not published any more.
          for (Holder& holder : holders) holder.tokens.resize(holder.nodes.size() * kWidth);
          break;
      }
      cache.check();
      REQUIRE(cache.num_available() == model.available());
      for (std::int32_t b = 0; b < kBlocks; ++b) REQUIRE(cache.references(b) == entry(b).references);
      REQUIRE(cache.num_hit_tokens() == hits);
    }
    // The walk has been where it hurts.
    CHECK(evictions > 50);
    CHECK(matched_blocks > 200);
    for (const Holder& holder : holders) cache.release(holder.blocks);
    CHECK(cache.num_available() == kBlocks);
    cache.check();
  }
}

TEST_CASE("the tail of a prefix is evicted before its head") {
  BlockCache cache(3, 2);
  const Tokens tokens = {1, 2, 3, 4, 5, 6};
  std::vector<std::int32_t> blocks;
  auto node = BlockCache::kRoot;
  for (std::size_t i = 0; i < 3; ++i) {
    blocks.push_back(*cache.try_allocate());
    node = cache.publish(blocks[i], node, std::span<const TokenId>(tokens).subspan(2 * i, 2));
  }
  cache.release(blocks);
  CHECK(cache.try_allocate() == blocks[2]);
  CHECK(cache.match(tokens) == std::vector<std::int32_t>{blocks[0], blocks[1]});
}

TEST_CASE("wrong use of the block cache is refused") {
  CHECK_THROWS_WITH(BlockCache(-1, 2), ContainsSubstring("BlockCache: -1 blocks of 2 tokens"));
  CHECK_THROWS_WITH(BlockCache(1, 0), ContainsSubstring("BlockCache: 1 blocks of 0 tokens"));
  BlockCache cache(2, 2);
  const Tokens two = {1, 2}, three = {1, 2, 3};
  CHECK_THROWS_WITH(cache.add_reference(0), "BlockCache: reference to free block 0");
  CHECK_THROWS_WITH(cache.publish(0, BlockCache::kRoot, two), ContainsSubstring("is not referenced"));
  const std::vector<std::int32_t> held = {*cache.try_allocate()};
  CHECK_THROWS_WITH(cache.publish(held[0], BlockCache::kRoot, three),
                    "BlockCache: published block of 3 tokens, expected 2");
  cache.publish(held[0], BlockCache::kRoot, two);
  CHECK_THROWS_WITH(cache.publish(held[0], BlockCache::kRoot, two),
                    ContainsSubstring("is published already"));
  CHECK_THROWS_WITH(cache.set_limit(3), "BlockCache: a limit of 3 blocks, expected 0 to 2");
  CHECK_THROWS_WITH(cache.set_limit(-1), "BlockCache: a limit of -1 blocks, expected 0 to 2");
  cache.release(held);
  CHECK_THROWS_WITH(cache.release(held), ContainsSubstring("released more often than referenced"));
}

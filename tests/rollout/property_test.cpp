// Properties under RapidCheck, which shrinks a failure to its shortest history. A failure prints the seed.
#include <rapidcheck.h>

#include <list>
#include <map>
#include <set>

#include "tests/rollout/support.h"

using namespace rlhf;

namespace {

using Tokens = std::vector<TokenId>;

// The block cache as a list of facts: what each block holds, who refers to it, and since when it is idle.
class CacheModel {
 public:
  static constexpr std::int32_t kBlocks = 6, kWidth = 2;

  void apply(std::uint8_t what, std::uint8_t which) {
    if (what < 4) start(which);
    if (what == 4) copy(which);
    if (what == 5 || what == 6) end(which);
    if (what == 7) set_limit(which % (kBlocks + 1));
    if (what == 8) forget();
    if (cache_.excess() == 0) compact();
    cache_.check();
    std::map<std::int32_t, std::int32_t> references;
    for (const auto& holder : holders_)
      for (std::int32_t block : holder) ++references[block];
    for (std::int32_t b = 0; b < kBlocks; ++b) RC_ASSERT(cache_.references(b) == references[b]);
    const auto held = static_cast<std::int32_t>(num_held());
    RC_ASSERT(cache_.num_available() == std::max(0, cache_.limit() - held));
    RC_ASSERT(cache_.excess() == std::max(0, held - cache_.limit()));
  }

  void finish() {
    while (!holders_.empty()) end(0);
    cache_.check();
    RC_ASSERT(cache_.num_available() == cache_.limit());
  }

 private:
  std::size_t num_held() const {
    std::set<std::int32_t> held;
    for (const auto& holder : holders_) held.insert(holder.begin(), holder.end());
    return held.size();
  }

  // A sequence of two or three blocks over two tokens: shares what is there, publishes the rest.
  void start(std::uint8_t which) {
    Tokens tokens;
    for (int i = 0; i < 4 + 2 * (which % 2); ++i) tokens.push_back((which >> i) & 1);
    auto blocks = cache_.match(tokens);
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      RC_ASSERT(content_.at(blocks[i]) == head(tokens, i));  // the right K/V
      idle_.remove(blocks[i]);
    }
    auto node = blocks.empty() ? BlockCache::kRoot : cache_.node(blocks.back());
    while (blocks.size() * kWidth < tokens.size()) {
      const std::size_t i = blocks.size();
      const auto block = cache_.try_allocate();
      if (!block) break;
      if (const auto idle = std::ranges::find(idle_, *block); idle != idle_.end()) {
        RC_ASSERT(idle == idle_.begin());  // the least recently used goes first
        idle_.erase(idle);
      }
      blocks.push_back(*block);
      content_[*block] = head(tokens, i);
      node = cache_.publish(*block, node, std::span<const TokenId>(tokens).subspan(i * kWidth, kWidth));
    }
    holders_.push_back(blocks);
  }
  void copy(std::uint8_t which) {
    if (holders_.empty()) return;
    const auto blocks = holders_[which % holders_.size()];
    for (std::int32_t block : blocks) cache_.add_reference(block);
    holders_.push_back(blocks);
  }
  void end(std::uint8_t which) {
    if (holders_.empty()) return;
    const auto holder = holders_.begin() + static_cast<std::ptrdiff_t>(which % holders_.size());
    const auto blocks = *holder;
    holders_.erase(holder);
    cache_.release(blocks);
    for (std::size_t i = blocks.size(); i-- > 0;)
      if (cache_.references(blocks[i]) == 0 && cache_.node(blocks[i]) != BlockCache::kRoot)
        idle_.push_back(blocks[i]);
  }
  void set_limit(std::int32_t limit) {
    cache_.set_limit(limit);
    drop_unpublished();
  }
  // Contents and users follow, and nothing is left beyond the limit.
  void compact() {
    std::map<std::int32_t, std::int32_t> names;
    for (const auto& [from, to] : cache_.compact()) {
      RC_ASSERT(to < cache_.limit());
      RC_ASSERT(from >= cache_.limit());
      RC_ASSERT(names.emplace(from, to).second);
      content_[to] = content_.at(from);
      content_.erase(from);
    }
    const auto rename = [&](std::int32_t& block) {
      if (const auto name = names.find(block); name != names.end()) block = name->second;
    };
    for (auto& holder : holders_) std::ranges::for_each(holder, rename);
    std::ranges::for_each(idle_, rename);
    for (std::int32_t b = cache_.limit(); b < kBlocks; ++b)
      RC_ASSERT(cache_.references(b) == 0 && cache_.node(b) == BlockCache::kRoot);
  }
  void forget() {
    cache_.forget_published();
    drop_unpublished();
  }
  void drop_unpublished() {
    idle_.remove_if([&](std::int32_t block) { return cache_.node(block) == BlockCache::kRoot; });
  }
  static Tokens head(const Tokens& tokens, std::size_t block) {
    return {tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>((block + 1) * kWidth)};
  }

  BlockCache cache_{kBlocks, kWidth};
  std::vector<std::vector<std::int32_t>> holders_;
  std::map<std::int32_t, Tokens> content_;
  std::list<std::int32_t> idle_;  // published, unreferenced, least recently used first
};

GenerationRequest random_request(PromptId id) {
  auto request = make_request(id, 1, *rc::gen::inRange<std::int64_t>(1, 24));
  request.prompt.clear();
  // Heads in common, of lengths around the size of a block.
  const auto head = *rc::gen::inRange<std::size_t>(0, 3) * 15;
  for (std::size_t i = 0; i < head; ++i) request.prompt.push_back(static_cast<TokenId>(i * 7 % 256));
  for (std::size_t i = 0, n = *rc::gen::inRange<std::size_t>(1, 20); i < n; ++i)
    request.prompt.push_back(*rc::gen::inRange<TokenId>(0, 256));
  request.num_samples = *rc::gen::inRange<std::uint32_t>(1, 4);
  request.priority = *rc::gen::inRange(-1, 2);
  request.stop.tokens = {3, 140};
  return request;
}

}  // namespace

TEST_CASE("any history of a block cache keeps counts, contents, order of eviction and limit") {
  REQUIRE(rc::check([](const std::vector<std::pair<std::uint8_t, std::uint8_t>>& history) {
    CacheModel model;
    for (const auto& [what, which] : history) model.apply(what % 9, which);
    model.finish();
  }));
}

TEST_CASE("any requests under any budget give what they give with all the room there is") {
  Setup setup;
  REQUIRE(rc::check([&] {
    std::vector<GenerationRequest> requests;
    for (PromptId id = 0, n = *rc::gen::inRange<PromptId>(1, 6); id < n; ++id)
      requests.push_back(random_request(id));
    RolloutEngineOptions options;
    options.num_blocks = *rc::gen::inRange<std::int64_t>(6, 20);
    options.max_sequences = *rc::gen::inRange<std::int64_t>(1, 9);
    options.max_tokens_per_step = *rc::gen::inRange<std::int64_t>(1, 60);
    options.max_draft_rows = *rc::gen::inRange<std::int64_t>(0, 30);
    options.draft_row_cost = 0;
    const auto tight = setup.engine(options);
    const auto expected = run(*setup.engine({}), setup.model, requests);
    const auto samples = run(*tight, setup.model, requests);
    RC_ASSERT(samples.size() == expected.size());
    for (const auto& [key, sample] : samples) {
      RC_ASSERT(sample.tokens == expected.at(key).tokens);
      RC_ASSERT(sample.logprobs == expected.at(key).logprobs);  // bit for bit
    }
    tight->scheduler().check();
    RC_ASSERT(tight->cache().num_available() == tight->cache().num_blocks());
  }));
}

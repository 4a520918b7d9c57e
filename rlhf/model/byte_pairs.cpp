#include "rlhf/model/byte_pairs.h"

#include <algorithm>
#include <bit>
#include <mutex>
#include <queue>

#include "rlhf/core/error.h"
#include "rlhf/model/byte_level.h"
#include "rlhf/model/utf8.h"

namespace rlhf {
namespace {

constexpr std::size_t kMaxCachedWords = 1 << 16;
constexpr std::size_t kMaxCachedBytes = 64;

std::uint64_t pair_key(TokenId left, TokenId right) {
  return (static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32) |
         static_cast<std::uint32_t>(right);
}

std::size_t slot_of(std::uint64_t key, std::size_t mask) {
  return static_cast<std::size_t>((key * 0x9E3779B97F4A7C15ull) >> 20) & mask;
}

}  // namespace

BytePairEncoder::BytePairEncoder(const TokenizerSpec& spec, const TextMap<TokenId>& ids)
    : fuse_unknown_(spec.fuse_unk) {
  for (unsigned byte = 0; byte < 256; ++byte) {
    std::string spelled;
    utf8::append(spelled, byte_level::byte_to_char()[byte]);
    const auto found = ids.find(spelled);
    byte_ids_[byte] = found == ids.end() ? -1 : found->second;
  }
  if (spec.unk_token) {
    const auto found = ids.find(*spec.unk_token);
    if (found == ids.end())
      fail<IoError>(spec.source, ": unk_token: ", *spec.unk_token, ": expected a token of the vocabulary");
    unknown_ = found->second;
  }
  merges_.resize(std::bit_ceil(2 * spec.merges.size() + 2));
  for (std::size_t rank = 0; rank < spec.merges.size(); ++rank) {
    const auto& [left, right] = spec.merges[rank];
    const auto left_id = ids.find(left), right_id = ids.find(right), joined = ids.find(left + right);
    if (left_id == ids.end() || right_id == ids.end() || joined == ids.end()) {
      fail<IoError>(spec.source, ": merge ", rank, " (", left, " ", right,
                    "): expected its parts and its result in the vocabulary");
    }
    add_merge(left_id->second, right_id->second, {static_cast<std::int32_t>(rank), joined->second});
  }
  if (spec.ignore_merges) {
    for (const auto& [token, id] : ids) whole_words_.emplace(byte_level::unspell(token), id);
  }
}

// A pair listed twice keeps its last rank, as in the tokenizers package.
void BytePairEncoder::add_merge(TokenId left, TokenId right, Merge merge) {
  const std::uint64_t key = pair_key(left, right);
  std::size_t slot = slot_of(key, merges_.size() - 1);
  while (merges_[slot].merge.rank >= 0 && merges_[slot].pair != key) slot = (slot + 1) & (merges_.size() - 1);
  merges_[slot] = {key, merge};
}

BytePairEncoder::Merge BytePairEncoder::find_merge(TokenId left, TokenId right) const {
  const std::uint64_t key = pair_key(left, right);
  std::size_t slot = slot_of(key, merges_.size() - 1);
  while (merges_[slot].merge.rank >= 0) {
    if (merges_[slot].pair == key) return merges_[slot].merge;
    slot = (slot + 1) & (merges_.size() - 1);
  }
  return {};
}

BytePairEncoder::Word BytePairEncoder::split_into_bytes(std::string_view word) const {
  Word symbols;
  symbols.ids.reserve(word.size());
  for (const char byte : word) {
    const TokenId id = byte_ids_[static_cast<unsigned char>(byte)];
    if (id >= 0) {
      symbols.ids.push_back(id);
    } else if (unknown_ < 0) {
      ++symbols.dropped;
    } else if (!fuse_unknown_ || symbols.ids.empty() || symbols.ids.back() != unknown_) {
      symbols.ids.push_back(unknown_);
    }
  }
  return symbols;
}

void BytePairEncoder::apply_merges(std::vector<TokenId>& symbols) const {
  struct Candidate {
    std::int32_t rank;
    std::int32_t position;
    TokenId id;
    // Reversed: std::priority_queue serves the largest.
    bool operator<(const Candidate& other) const {
      return rank != other.rank ? rank > other.rank : position > other.position;
    }
  };
  const auto size = static_cast<std::int32_t>(symbols.size());
  std::vector<std::int32_t> next(symbols.size()), previous(symbols.size());
  std::priority_queue<Candidate> queue;
  const auto offer = [&](std::int32_t left) {
    if (left < 0 || next[left] >= size) return;
    const Merge merge = find_merge(symbols[left], symbols[next[left]]);
    if (merge.rank >= 0) queue.push({merge.rank, left, merge.id});
  };
  for (std::int32_t i = 0; i < size; ++i) {
    next[i] = i + 1;
    previous[i] = i - 1;
  }
  for (std::int32_t i = 0; i + 1 < size; ++i) offer(i);
  constexpr TokenId kMerged = -1;
  while (!queue.empty()) {
    const Candidate best = queue.top();
    queue.pop();
    const std::int32_t left = best.position, right = next[left];
    // Either side may have been merged away since this pair was offered.
    if (symbols[left] == kMerged || right >= size) continue;
    const Merge now = find_merge(symbols[left], symbols[right]);
    if (now.rank != best.rank || now.id != best.id) continue;
    symbols[left] = best.id;
    symbols[right] = kMerged;
    next[left] = next[right];
    if (next[right] < size) previous[next[right]] = left;
    offer(previous[left]);
    offer(left);
  }
  symbols.erase(std::remove(symbols.begin(), symbols.end(), kMerged), symbols.end());
}

std::size_t BytePairEncoder::encode(std::string_view word, std::vector<TokenId>& out) const {
  if (!whole_words_.empty()) {
    if (const auto found = whole_words_.find(word); found != whole_words_.end()) {
      out.push_back(found->second);
      return 0;
    }
  }
  const bool cacheable = word.size() <= kMaxCachedBytes;
  if (cacheable) {
    const std::shared_lock lock(cache_mutex_);
    if (const auto found = cache_.find(word); found != cache_.end()) {
      out.insert(out.end(), found->second.ids.begin(), found->second.ids.end());
      return found->second.dropped;
    }
  }
  Word symbols = split_into_bytes(word);
  apply_merges(symbols.ids);
  out.insert(out.end(), symbols.ids.begin(), symbols.ids.end());
  const std::size_t dropped = symbols.dropped;
  if (cacheable) {
    const std::unique_lock lock(cache_mutex_);
    if (cache_.size() < kMaxCachedWords) cache_.emplace(word, std::move(symbols));
  }
  return dropped;
}

}  // namespace rlhf

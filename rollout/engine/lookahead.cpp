#include "rollout/engine/lookahead.h"

#include "rlhf/core/error.h"

namespace rlhf {
namespace {

// Chances before anything was judged, and how fast judgements move them: some 30 of them count.
constexpr std::array<double, 4> kFirstChance = {0.7, 0.6, 0.5, 0.4};
constexpr double kPace = 1.0 / 32;

}  // namespace

Lookahead::Lookahead(int log2_entries) : chance_(kFirstChance) {
  RLHF_CHECK(log2_entries >= 4 && log2_entries <= 28, "lookahead: a table of 2^", log2_entries,
             " entries, expected 2^4 to 2^28");
  entries_.resize(std::size_t{1} << log2_entries);
}

// FNV-1a over tokens and length, with the bits mixed once more so that the low ones can be the slot.
std::uint64_t Lookahead::key_of(std::span<const TokenId> context) {
  std::uint64_t key = 14695981039346656037ull + context.size();
  for (const TokenId token : context) key = (key ^ static_cast<std::uint32_t>(token)) * 1099511628211ull;
  key ^= key >> 32;
  key *= 0x9e3779b97f4a7c15ull;
  key ^= key >> 29;
  return key == 0 ? 1 : key;
}

void Lookahead::add(std::span<const TokenId> tokens, std::size_t from) {
  for (std::size_t i = from; i < tokens.size(); ++i)
    for (const std::size_t length : kContexts) {
      if (length > i) continue;
      const std::uint64_t key = key_of(tokens.subspan(i - length, length));
      entry(key) = {key, tokens[i]};
    }
}

void Lookahead::guess(std::span<const TokenId> tokens, std::size_t count, std::vector<Guess>& guesses) {
  const std::size_t kept = std::min(tokens.size(), kContexts.front());
  text_.assign(tokens.end() - static_cast<std::ptrdiff_t>(kept), tokens.end());
  for (std::size_t made = 0; made < count; ++made) {
    const std::size_t before = guesses.size();
    for (std::size_t order = 0; order < kContexts.size() && guesses.size() == before; ++order) {
      if (kContexts[order] > text_.size()) continue;
      const std::uint64_t key = key_of(std::span<const TokenId>(text_).last(kContexts[order]));
      const Entry& found = entry(key);
      if (found.key == key) guesses.push_back({found.next, chance_[order], static_cast<std::uint8_t>(order)});
    }
    if (guesses.size() == before) return;
    text_.push_back(guesses.back().token);
  }
}

void Lookahead::judge(const Guess& guess, bool right) {
  double& chance = chance_[guess.order];
  chance += kPace * ((right ? 1 : 0) - chance);
}

}  // namespace rlhf

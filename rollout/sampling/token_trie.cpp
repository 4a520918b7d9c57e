#include "rollout/sampling/token_trie.h"

#include "rlhf/core/error.h"

namespace rlhf {

TokenTrie::TokenTrie(const std::vector<std::vector<TokenId>>& sequences) : entries_(1) {
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    RLHF_CHECK(!sequences[i].empty(), "choice ", i + 1, " is empty");
    Node node = kRoot;
    for (const TokenId token : sequences[i]) {
      const auto fresh = static_cast<Node>(entries_.size());
      const auto [edge, is_new] = entries_[static_cast<std::size_t>(node)].next.emplace(token, fresh);
      node = edge->second;
      if (is_new) entries_.emplace_back();
    }
    Entry& end = entries_[static_cast<std::size_t>(node)];
    RLHF_CHECK(end.sequence == 0, "choice ", i + 1, " equals choice ", end.sequence);
    end.sequence = i + 1;
  }
}

std::optional<std::size_t> TokenTrie::inner_end() const {
  for (const Entry& entry : entries_)
    if (entry.sequence > 0 && !entry.next.empty()) return entry.sequence;
  return std::nullopt;
}

}  // namespace rlhf

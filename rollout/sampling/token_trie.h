#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <vector>

#include "rlhf/core/ids.h"

namespace rlhf {

/// Token sequences as a prefix tree: what a response that must equal one of them may go on with.
class TokenTrie {
 public:
  using Node = std::int32_t;
  static constexpr Node kRoot = 0;

  /// @throws InvalidArgument for an empty sequence or one that is there twice, counting from 1.
  explicit TokenTrie(const std::vector<std::vector<TokenId>>& sequences);

  /// Tokens that may follow, with the nodes they lead to.
  const std::map<TokenId, Node>& next(Node node) const {
    return entries_[static_cast<std::size_t>(node)].next;
  }
  /// True when a sequence ends here.
  bool ends(Node node) const { return entries_[static_cast<std::size_t>(node)].sequence > 0; }
  /// Some sequence that is the beginning of another, counting from 1; none when there is no such.
  std::optional<std::size_t> inner_end() const;

 private:
  struct Entry {
    std::map<TokenId, Node> next;
    std::size_t sequence = 0;  ///< that ends here, counting from 1
  };
  std::vector<Entry> entries_;
};

}  // namespace rlhf

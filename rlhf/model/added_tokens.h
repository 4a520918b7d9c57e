#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <string_view>
#include <vector>

#include "rlhf/model/tokenizer_spec.h"

namespace rlhf {

/// A part of a text: an added token, or plain text (id -1).
struct TextPart {
  std::size_t begin = 0;
  std::size_t end = 0;
  TokenId id = -1;
};

/// Finds added tokens in a text: leftmost, longest first, then the single_word and strip rules of the
/// tokenizers package. Immutable and thread-safe.
class AddedTokenFinder {
 public:
  explicit AddedTokenFinder(std::vector<AddedToken> tokens);

  struct Rules {
    bool match_special = true;
    std::span<const std::size_t> literal_offsets = {};
  };
  /// The parts of `text` in order, covering it. Empty parts are left out.
  std::vector<TextPart> split(std::string_view text, const Rules& rules) const;

 private:
  struct Node {
    std::map<unsigned char, std::uint32_t> children;
    std::int32_t token = -1;
  };
  std::int32_t longest_match(std::string_view text) const;

  std::vector<AddedToken> tokens_;
  std::vector<Node> nodes_;
  std::array<bool, 256> first_bytes_{};
};

}  // namespace rlhf

#pragma once

#include <deque>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "rlhf/model/regex.h"
#include "rlhf/model/tokenizer_spec.h"

namespace rlhf {

/// Cuts normalised text into the pieces that byte-pair encoding works on. Immutable and thread-safe.
class PreTokenizer {
 public:
  /// @throws IoError for a pattern that does not compile.
  explicit PreTokenizer(const TokenizerSpec& spec);

  /// The pieces in order. They view `text`, or `storage` where a space had to be put in front.
  std::vector<std::string_view> split(std::string_view text, std::deque<std::string>& storage) const;

 private:
  struct Step {
    SplitRule rule;
    // Unset when the pattern is empty: the step only adds a prefix space.
    std::optional<Regex> regex;
  };
  std::vector<Step> steps_;
};

/// Applies one Unicode normalisation form. ASCII text is returned as it is. `text` must be valid UTF-8.
std::string normalize_unicode(std::string_view text, UnicodeForm form);

}  // namespace rlhf

#pragma once

#include <string>
#include <string_view>

#include "rlhf/data/sample.h"

namespace rlhf {

/// A response that is to be scored, with what it answers. Views: valid during the call only.
struct ScoredSample {
  const Prompt& prompt;
  const Sample& sample;
  /// The decoded response without special tokens, tool results inside it included; where an environment has
  /// opened further turns, the last of them.
  std::string_view text;
};

/// One named part of a reward. Embedders derive from it to bring their own.
class RewardTerm {
 public:
  virtual ~RewardTerm() = default;
  /// Name in logs and reports; unique within a composition.
  virtual std::string_view name() const = 0;
  /// Returns the score of one response; higher is better. May be called from several threads at once. An
  /// exception or a value that is not finite ends the step with an error that names this term and the prompt.
  virtual double score(const ScoredSample& scored) const = 0;
};

}  // namespace rlhf

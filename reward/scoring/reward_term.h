#pragma once

#include <future>
#include <string>
#include <string_view>

#include "rlhf/core/error.h"
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

/// No score can be had for a response, for no fault of the response or of this program: a server did not
/// answer. TermOptions::on_failure says what becomes of it.
class RewardUnavailable : public Error {
 public:
  using Error::Error;
};

/// One named part of a reward. Embedders derive from it to bring their own.
class RewardTerm {
 public:
  virtual ~RewardTerm() = default;
  /// Name in logs and reports; unique within a composition.
  virtual std::string_view name() const = 0;
  /// Returns the score of one response; higher is better. May be called from several threads at once. An
  /// exception other than RewardUnavailable, or a value that is not finite, ends the step with an error that
  /// names this term and the prompt.
  virtual double score(const ScoredSample& scored) const = 0;
  /// Begins to score in the background, for terms that wait for something: what it returns is asked in place
  /// of score(). It must keep nothing of `scored`. Invalid, as here: score() computes at once.
  virtual std::shared_future<double> begin(const ScoredSample& /*scored*/) const { return {}; }
};

}  // namespace rlhf

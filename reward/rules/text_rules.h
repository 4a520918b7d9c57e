#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "reward/scoring/reward_term.h"

/// Reward terms without a network, for any task. Gold answers come from `Prompt::reference`, a JSON text,
/// number, list of accepted answers, or object with one of these under "answer", "label" or "value"; a
/// reference of another form is an InvalidArgument.
namespace rlhf {

/// Returns the gold answers of a prompt as texts. @throws InvalidArgument.
std::vector<std::string> gold_answers(const Prompt& prompt);

/// Lower case, runs of white space as one space, none at the ends, no full stop at the end.
std::string normalise_answer(std::string_view text);

/// Word-overlap F1 of normalised texts in [0, 1] (as in SQuAD, without its article rule); 1 when both are
/// empty.
double word_f1(std::string_view answer, std::string_view gold);

/// 1 when the normalised response equals a gold answer, else 0.
class ExactMatch : public RewardTerm {
 public:
  std::string_view name() const override { return "exact_match"; }
  double score(const ScoredSample& scored) const override;
};

/// The best word F1 over the gold answers.
class F1Match : public RewardTerm {
 public:
  std::string_view name() const override { return "f1"; }
  double score(const ScoredSample& scored) const override;
};

/// 1 when the last number of the response is within the tolerance of a gold number, else 0.
class NumberMatch : public RewardTerm {
 public:
  struct Tolerance {
    double relative = 0.005;
    double absolute = 1e-9;
  };
  explicit NumberMatch(Tolerance tolerance) : tolerance_(tolerance) {}
  std::string_view name() const override { return "number"; }
  double score(const ScoredSample& scored) const override;

 private:
  Tolerance tolerance_;
};

/// 1 when a Perl-compatible regular expression (UTF-8) is found in the response, else 0. Anchor it for a full
/// match. A match that needs more than a million steps counts as not found.
class RegexMatch : public RewardTerm {
 public:
  /// @throws ConfigError with the position in the pattern.
  explicit RegexMatch(const std::string& pattern);
  ~RegexMatch() override;
  std::string_view name() const override { return "regex"; }
  double score(const ScoredSample& scored) const override;
  /// Whether the pattern is found in a text.
  bool matches(std::string_view text) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// What a well-formed response looks like; empty strings and zeros switch a demand off.
struct FormatDemands {
  std::string prefix;  ///< the response starts with this
  std::string suffix;  ///< and ends with this
  std::size_t max_lines = 0;
  std::vector<std::string> contains;  ///< each of these occurs exactly once, in this order
};

/// The share of the demands that a response meets, in [0, 1].
class FormatRule : public RewardTerm {
 public:
  /// @throws ConfigError when nothing is demanded.
  explicit FormatRule(FormatDemands demands);
  std::string_view name() const override { return "format"; }
  double score(const ScoredSample& scored) const override;

 private:
  FormatDemands demands_;
};

/// 0 within [min_tokens, max_tokens], falling by 1 / `slope_tokens` per token outside, never below -1. Only
/// tokens chosen by the policy count (mask 1).
class LengthRule : public RewardTerm {
 public:
  struct Range {
    std::size_t min_tokens = 0;
    std::size_t max_tokens = 256;
    std::size_t slope_tokens = 16;
  };
  /// @throws ConfigError for an empty range or a zero slope.
  explicit LengthRule(Range range);
  std::string_view name() const override { return "length"; }
  double score(const ScoredSample& scored) const override;

 private:
  Range range_;
};

}  // namespace rlhf

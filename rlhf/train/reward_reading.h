#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "rlhf/config/field.h"
#include "rlhf/core/ids.h"
#include "rlhf/model/tokenizer.h"

namespace rlhf {

/// What a reward model learns.
enum class RewardTarget {
  kPairs,   ///< to order pairs (Bradley-Terry): one score at the last token
  kScores,  ///< to predict given scores: one or several objectives at the last token
  kSteps,   ///< to predict the score of each step of an answer, at the step's last token
};

/// How the rewards of an answer's steps become one score.
enum class StepScore { kMin, kMean, kLast, kSum };

/// One of several scores that a reward model gives an answer.
struct RewardObjective {
  std::string name;
  double weight = 1;

  template <class V>
  void visit_fields(V& v) {
    v.field("name", name, "Name of the objective in metrics");
    v.field("weight", weight, "Its factor in the score of the answer", {-1e6, 1e6});
  }
};

struct RewardReadingOptions {
  RewardTarget target = RewardTarget::kPairs;
  std::vector<RewardObjective> objectives;  ///< kScores; empty = one without a name
  std::string step_separator = "\n";        ///< kSteps
  StepScore step_score = StepScore::kMin;   ///< kSteps

  template <class V>
  void visit_fields(V& v) {
    v.choice(
        "target", target,
        {{"pairs", RewardTarget::kPairs}, {"scores", RewardTarget::kScores}, {"steps", RewardTarget::kSteps}},
        "What is learned: the order of pairs, scores of answers, or scores of the steps of answers");
    v.list("objectives", objectives,
           "target: scores - the numbers under \"scores\" of a record, in order; empty = a single \"score\"");
    v.field("step_separator", step_separator, "target: steps - text that ends a step of an answer");
    v.choice("step_score", step_score,
             {{"min", StepScore::kMin},
              {"mean", StepScore::kMean},
              {"last", StepScore::kLast},
              {"sum", StepScore::kSum}},
             "target: steps - how the rewards of the steps become the score of an answer");
  }
  void validate(config::Problems& problems) const;

  std::size_t num_outputs() const { return objectives.empty() ? 1 : objectives.size(); }
};

/// Where the outputs of a reward model are read, and what score they make.
class RewardReading {
 public:
  /// One output at the last token: the score.
  RewardReading() = default;
  /// @param tokenizer only used with kSteps, and copied then. @param end_tokens are no text of a step
  RewardReading(RewardReadingOptions options, const Tokenizer* tokenizer, std::vector<TokenId> end_tokens);

  std::size_t num_outputs() const { return options_.num_outputs(); }
  bool has_steps() const { return options_.target == RewardTarget::kSteps; }
  const RewardReadingOptions& options() const { return options_; }

  /// Indices of `tokens` (prompt and answer, not empty) whose outputs count: the last one, or with kSteps the
  /// last token of each step. A step is a stretch of the answer's text between separators that is not empty;
  /// what follows the last separator ends with the sequence. Two steps that end in one token are one.
  /// @param mask per token; 1 = text of the answer. Only read with kSteps
  std::vector<std::size_t> positions(std::span<const TokenId> tokens,
                                     std::span<const std::uint8_t> mask) const;
  /// Score of the answer. @param outputs [positions][num_outputs]
  double score(std::span<const double> outputs) const;

 private:
  RewardReadingOptions options_;
  std::vector<Tokenizer> tokenizer_;  ///< none or one
  std::vector<TokenId> end_tokens_;
};

}  // namespace rlhf

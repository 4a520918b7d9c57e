#pragma once

#include <string_view>

#include "reward/scoring/reward_term.h"
#include "rlhf/data/finance_desk/desk.h"

namespace rlhf::finance {

/// The verifiable reward of the finance desk (see rlhf/data/finance_desk/desk.h). `Prompt::task` names the
/// kind:
///  - intent: 1 for the gold label, 0.1 for another valid label, 0 otherwise
///  - gate: 1 for the gold answer, -0.5 for refusing a request without risk, 0 otherwise
///  - calculation: 1 when the value of the last `<calc>` is within 0.5 % of the gold value, 0.1 when it can
///  be evaluated, 0
///    otherwise; and 0 when a number of the response neither occurs in nor follows from question and tool
///    result
///  - clause: word F1 with the gold span (1 when equal); 0 when a number of the response is not in the clause
///  - view: 1 for the gold label, 0 otherwise
/// Labels are compared after trimming white space and one full stop; letter case counts.
class FinanceReward : public RewardTerm {
 public:
  std::string_view name() const override { return "finance"; }
  /// @throws InvalidArgument for a task that is no kind of the desk, or a reference without the kind's keys.
  double score(const ScoredSample& scored) const override;
};

/// Whether a response has the form its kind asks for, right or wrong: a known label or verdict, one `<calc>`
/// that evaluates, one line of at most 16 words for a clause.
bool is_well_formed(Kind kind, std::string_view text);

}  // namespace rlhf::finance

#pragma once
#include <string>
#include <utility>

#include "reward/scoring/reward_term.h"

namespace rlhf {

/// Scores one text with a term; `reference` is the prompt's reference JSON.
inline double score_of(const RewardTerm& term, const std::string& text, std::string reference,
                       std::string task = "") {
  Prompt prompt;
  prompt.id = 7;
  prompt.task = std::move(task);
  prompt.reference = std::move(reference);
  const Sample sample;
  return term.score({prompt, sample, text});
}

}  // namespace rlhf

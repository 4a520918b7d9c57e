#include "reward/scoring/composition.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "rlhf/core/error.h"

namespace rlhf {
namespace {

double clamp_to(const TermWeight& weight, double score) {
  return std::clamp(score, weight.clip_min, weight.clip_max);
}

std::string where(const RewardTerm& term, const ScoredSample& scored) {
  return concat("reward term \"", term.name(), "\", prompt ", scored.prompt.id,
                scored.prompt.task.empty() ? "" : concat(" (", scored.prompt.task, ")"), ", sample ",
                scored.sample.sample_index);
}

double checked_score(const RewardTerm& term, const ScoredSample& scored) {
  double score = 0;
  try {
    score = term.score(scored);
  } catch (const std::exception& error) {
    fail<Error>(where(term, scored), ": ", error.what());
  }
  if (!std::isfinite(score))
    fail<Error>(where(term, scored), ": the score is ", score, ", expected a finite number");
  return score;
}

}  // namespace

void RewardComposition::add(std::unique_ptr<RewardTerm> term, TermWeight weight) {
  RLHF_CHECK(term != nullptr, "reward composition: the term is missing");
  for (const Entry& entry : entries_) {
    RLHF_CHECK(entry.term->name() != term->name(), "reward composition: two terms are called \"",
               term->name(), '"');
  }
  RLHF_CHECK(std::isfinite(weight.weight), "reward term \"", term->name(), "\": weight ", weight.weight,
             " is not finite");
  RLHF_CHECK(weight.clip_min <= weight.clip_max, "reward term \"", term->name(), "\": clip_min ",
             weight.clip_min, " is not below clip_max ", weight.clip_max);
  entries_.push_back({std::move(term), weight});
}

std::vector<std::string> RewardComposition::names() const {
  std::vector<std::string> names;
  for (const Entry& entry : entries_) names.emplace_back(entry.term->name());
  return names;
}

Score RewardComposition::score(const ScoredSample& scored) const {
  Score out;
  for (const Entry& entry : entries_) {
    out.terms.push_back(checked_score(*entry.term, scored));
    out.total += entry.weight.weight * clamp_to(entry.weight, out.terms.back());
  }
  return out;
}

std::vector<TermStatistics> RewardComposition::summarise(std::span<const Score> scores) const {
  std::vector<TermStatistics> out(entries_.size());
  std::vector<double> weights(entries_.size());
  double all_weights = 0;
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    TermStatistics& term = out[i];
    term.name = entries_[i].term->name();
    if (scores.empty()) continue;
    term.min = std::numeric_limits<double>::infinity();
    term.max = -term.min;
    for (const Score& score : scores) {
      const double raw = score.terms.at(i);
      const double clamped = clamp_to(entries_[i].weight, raw);
      term.mean += raw;
      term.min = std::min(term.min, raw);
      term.max = std::max(term.max, raw);
      term.clipped += clamped != raw;
      weights[i] += std::abs(entries_[i].weight.weight * clamped);
    }
    const auto count = static_cast<double>(scores.size());
    term.mean /= count;
    term.clipped /= count;
    for (const Score& score : scores) term.stddev += std::pow(score.terms[i] - term.mean, 2);
    term.stddev = std::sqrt(term.stddev / count);
    all_weights += weights[i];
  }
  for (std::size_t i = 0; i < out.size() && all_weights > 0; ++i) out[i].share = weights[i] / all_weights;
  return out;
}

}  // namespace rlhf

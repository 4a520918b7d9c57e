#include "reward/scoring/composition.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "rlhf/core/error.h"

namespace rlhf {
namespace {

double clip(const TermOptions& options, double score) {
  if (options.clip_min) score = std::max(score, *options.clip_min);
  if (options.clip_max) score = std::min(score, *options.clip_max);
  return score;
}

double factor_at(const std::vector<WeightPoint>& schedule, double iteration) {
  const auto next = std::ranges::upper_bound(schedule, iteration, {}, &WeightPoint::iteration);
  if (next == schedule.begin()) return next->factor;
  const auto before = next - 1;
  if (next == schedule.end()) return before->factor;
  const double way = (iteration - before->iteration) / (next->iteration - before->iteration);
  return before->factor + way * (next->factor - before->factor);
}

std::string where(const std::string& name, const ScoredSample& scored) {
  return concat("reward term \"", name, "\", prompt ", scored.prompt.id,
                scored.prompt.task.empty() ? "" : concat(" (", scored.prompt.task, ")"), ", sample ",
                scored.sample.sample_index);
}

double checked_score(const RewardTerm& term, const std::string& name, const ScoredSample& scored) {
  double score = 0;
  try {
    score = term.score(scored);
  } catch (const std::exception& error) {
    fail<Error>(where(name, scored), ": ", error.what());
  }
  if (!std::isfinite(score))
    fail<Error>(where(name, scored), ": the score is ", score, ", expected a finite number");
  return score;
}

}  // namespace

void RewardComposition::add(std::unique_ptr<RewardTerm> term, TermOptions options) {
  RLHF_CHECK(term != nullptr, "reward composition: the term is missing");
  if (options.name.empty()) options.name = term->name();
  for (const char* reserved : {"total", "rules", "model"})
    RLHF_CHECK(options.name != reserved, "reward composition: a term cannot be called \"", reserved,
               "\": the metric reward/", reserved, " is another number");
  for (const Entry& entry : entries_)
    RLHF_CHECK(entry.options.name != options.name, "reward composition: two terms are called \"",
               options.name, "\"; give them names of their own");
  config::Problems problems;
  options.validate(problems);
  for (const auto& problem : problems.all())
    fail<InvalidArgument>("reward term \"", options.name, "\": ", problem.key, " ", problem.message);
  entries_.push_back({std::move(term), std::move(options)});
}

std::size_t RewardComposition::gate_of(const Entry& entry) const {
  const std::string& name = entry.options.gate->term;
  const auto found =
      std::ranges::find_if(entries_, [&](const Entry& other) { return other.options.name == name; });
  if (found == entries_.end() || name == entry.options.name) {
    std::string others;
    for (const Entry& other : entries_)
      if (&other != &entry) others += concat(others.empty() ? "" : ", ", '"', other.options.name, '"');
    fail<InvalidArgument>("reward term \"", entry.options.name, "\": gate.term is \"", name,
                          "\", expected another term; ",
                          others.empty() ? "there is none" : concat("there are ", others));
  }
  return static_cast<std::size_t>(found - entries_.begin());
}

void RewardComposition::check() const {
  for (const Entry& entry : entries_)
    if (entry.options.gate) gate_of(entry);
}

std::vector<std::string> RewardComposition::names() const {
  std::vector<std::string> names;
  for (const Entry& entry : entries_) names.push_back(entry.options.name);
  return names;
}

bool RewardComposition::normalizes() const {
  return std::ranges::any_of(
      entries_, [](const Entry& entry) { return entry.options.normalize != TermNormalization::kNone; });
}

double RewardComposition::weight(std::size_t term, Iteration iteration) const {
  const TermOptions& options = entries_.at(term).options;
  if (!iteration || options.schedule.empty()) return options.weight;
  return options.weight * factor_at(options.schedule, static_cast<double>(*iteration));
}

bool RewardComposition::is_gated(const Entry& entry, const std::vector<double>& terms) const {
  return entry.options.gate && terms.at(gate_of(entry)) < entry.options.gate->min;
}

Score RewardComposition::score(const ScoredSample& scored, Iteration iteration) const {
  Score out;
  for (const Entry& entry : entries_)
    out.terms.push_back(checked_score(*entry.term, entry.options.name, scored));
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    const Entry& entry = entries_[i];
    out.values.push_back(is_gated(entry, out.terms) ? entry.options.gate->otherwise
                                                    : clip(entry.options, out.terms[i]));
    out.total += weight(i, iteration) * out.values[i];
  }
  return out;
}

std::vector<TermStatistics> RewardComposition::summarise(std::span<const Score> scores,
                                                         Iteration iteration) const {
  std::vector<TermStatistics> out(entries_.size());
  std::vector<double> weighted(entries_.size());
  double all = 0;
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    TermStatistics& term = out[i];
    const Entry& entry = entries_[i];
    term.name = entry.options.name;
    if (scores.empty()) continue;
    term.min = std::numeric_limits<double>::infinity();
    term.max = -term.min;
    for (const Score& score : scores) {
      const double raw = score.terms.at(i);
      const bool gated = is_gated(entry, score.terms);
      term.mean += raw;
      term.min = std::min(term.min, raw);
      term.max = std::max(term.max, raw);
      term.gated += gated;
      term.clipped += !gated && clip(entry.options, raw) != raw;
      weighted[i] += std::abs(weight(i, iteration) * score.values.at(i));
    }
    const auto count = static_cast<double>(scores.size());
    term.mean /= count;
    term.clipped /= count;
    term.gated /= count;
    for (const Score& score : scores) term.stddev += std::pow(score.terms[i] - term.mean, 2);
    term.stddev = std::sqrt(term.stddev / count);
    all += weighted[i];
  }
  for (std::size_t i = 0; i < out.size() && all > 0; ++i) out[i].share = weighted[i] / all;
  return out;
}

}  // namespace rlhf

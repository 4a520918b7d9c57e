#include "reward/scoring/composition.h"

#include <algorithm>
#include <cmath>
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

// A term's score, or failure_score and the reason.
double checked_score(const RewardTerm& term, const TermOptions& options, const ScoredSample& scored,
                     const std::shared_future<double>& pending, std::string& reason) {
  double score = 0;
  try {
    score = pending.valid() ? pending.get() : term.score(scored);
  } catch (const RewardUnavailable& error) {
    if (options.on_failure == OnFailure::kStop) fail<Error>(where(options.name, scored), ": ", error.what());
    reason = error.what();
    return options.failure_score;
  } catch (const std::exception& error) {
    fail<Error>(where(options.name, scored), ": ", error.what());
  }
  if (!std::isfinite(score))
    fail<Error>(where(options.name, scored), ": the score is ", score, ", expected a finite number");
  return score;
}

// Mean, deviation and range; 0 without a score.
void describe(const std::vector<double>& raw, TermStatistics& out) {
  if (raw.empty()) return;
  const auto count = static_cast<double>(raw.size());
  for (const double score : raw) out.mean += score;
  out.mean /= count;
  for (const double score : raw) out.stddev += std::pow(score - out.mean, 2);
  out.stddev = std::sqrt(out.stddev / count);
  const auto [min, max] = std::ranges::minmax(raw);
  out.min = min;
  out.max = max;
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

PendingScore RewardComposition::begin(const ScoredSample& scored) const {
  PendingScore pending;
  for (const Entry& entry : entries_) pending.push_back(entry.term->begin(scored));
  return pending;
}

Score RewardComposition::score(const ScoredSample& scored, Iteration iteration,
                               const PendingScore& pending) const {
  Score out;
  out.reasons.resize(entries_.size());
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    const auto& [term, options] = entries_[i];
    out.terms.push_back(checked_score(*term, options, scored,
                                      pending.empty() ? std::shared_future<double>() : pending.at(i),
                                      out.reasons[i]));
    out.dropped |= !out.reasons[i].empty() && options.on_failure == OnFailure::kDrop;
  }
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
    std::vector<double> raw;
    for (const Score& score : scores) {
      const bool gated = is_gated(entry, score.terms);
      term.gated += gated;
      term.clipped += !gated && clip(entry.options, score.terms.at(i)) != score.terms[i];
      weighted[i] += std::abs(weight(i, iteration) * score.values.at(i));
      if (score.reasons.at(i).empty()) raw.push_back(score.terms[i]);
    }
    const auto count = static_cast<double>(scores.size());
    term.clipped /= count;
    term.gated /= count;
    term.failed = 1 - static_cast<double>(raw.size()) / count;
    describe(raw, term);
    all += weighted[i];
  }
  for (std::size_t i = 0; i < out.size() && all > 0; ++i) out[i].share = weighted[i] / all;
  return out;
}

}  // namespace rlhf

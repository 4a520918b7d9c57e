#include "rlhf/train/term_normalizers.h"

#include "rlhf/core/error.h"

namespace rlhf {
namespace {

constexpr double kGroupEpsilon = 1e-4;  // as TRL's normalize_then_sum

ppo::ScoreNormalization running_kind(const TermOptions& options) {
  return options.normalize == TermNormalization::kRunning ? ppo::ScoreNormalization::kRunning
                                                          : ppo::ScoreNormalization::kNone;
}

std::vector<double> values_of(std::span<const Score* const> scores, std::size_t term) {
  std::vector<double> values;
  for (const Score* score : scores) values.push_back(score->values.at(term));
  return values;
}

void normalize_in_group(std::vector<double>& values) {
  ppo::ScoreNormalizer group(ppo::ScoreNormalization::kRunning);
  group.observe(values);
  for (double& value : values) value = (value - group.state().mean) / (group.deviation() + kGroupEpsilon);
}

std::string key(std::size_t term, const char* number) {
  return concat("term", term, '_', number);
}

}  // namespace

TermNormalizers::TermNormalizers(const RewardComposition& rules) : rules_(&rules) {
  for (std::size_t i = 0; i < rules.size(); ++i) running_.emplace_back(running_kind(rules.options(i)));
}

bool TermNormalizers::needs_whole_batch(const RewardComposition& rules) {
  for (std::size_t i = 0; i < rules.size(); ++i)
    if (running_kind(rules.options(i)) != ppo::ScoreNormalization::kNone) return true;
  return false;
}

void TermNormalizers::observe(std::span<const Score* const> batch) {
  for (std::size_t i = 0; i < running_.size(); ++i) running_[i].observe(values_of(batch, i));
}

std::vector<double> TermNormalizers::totals(std::span<const Score* const> group,
                                            std::int64_t iteration) const {
  std::vector<double> totals(group.size());
  for (std::size_t i = 0; i < running_.size(); ++i) {
    std::vector<double> values = values_of(group, i);
    if (rules_->options(i).normalize == TermNormalization::kGroup) normalize_in_group(values);
    for (std::size_t k = 0; k < values.size(); ++k)
      totals[k] += rules_->weight(i, iteration) * running_[i].normalize(values[k]);
  }
  return totals;
}

void TermNormalizers::save(std::map<std::string, double>& numbers) const {
  for (std::size_t i = 0; i < running_.size(); ++i) {
    if (running_kind(rules_->options(i)) == ppo::ScoreNormalization::kNone) continue;
    const auto& state = running_[i].state();
    numbers[key(i, "count")] = state.count;
    numbers[key(i, "mean")] = state.mean;
    numbers[key(i, "squares")] = state.squares;
  }
}

void TermNormalizers::restore(const std::map<std::string, double>& numbers) {
  for (std::size_t i = 0; i < running_.size(); ++i) {
    if (running_kind(rules_->options(i)) == ppo::ScoreNormalization::kNone) continue;
    running_[i].restore(
        {numbers.at(key(i, "count")), numbers.at(key(i, "mean")), numbers.at(key(i, "squares"))});
  }
}

}  // namespace rlhf

#include "rlhf/ppo/rollout_rejection.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>
#include <utility>

#include "rlhf/core/error.h"

namespace rlhf::ppo {
namespace {

using Reduction = RejectionRule::Reduction;

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) {
    const auto first = part.find_first_not_of(" \t");
    if (first == std::string::npos) continue;
    parts.push_back(part.substr(first, part.find_last_not_of(" \t") - first + 1));
  }
  return parts;
}

double parse_bound(const std::string& text, const std::string& rule) {
  std::size_t used = 0;
  double value = 0;
  try {
    value = std::stod(text, &used);
  } catch (const std::exception&) {
    used = 0;
  }
  RLHF_CHECK(used == text.size() && used > 0 && value > 0, "rejection rule ", rule, ": threshold '", text,
             "' is not a positive number");
  return value;
}

RejectionRule parse_rule(const std::string& name, const std::string& threshold) {
  static const std::pair<const char*, Reduction> kReductions[] = {{"token_k", Reduction::kToken},
                                                                  {"seq_sum_k", Reduction::kSequenceSum},
                                                                  {"seq_mean_k", Reduction::kSequenceMean},
                                                                  {"seq_max_k", Reduction::kSequenceMax}};
  for (const auto& [prefix, reduction] : kReductions) {
    const std::string start(prefix);
    if (name.size() != start.size() + 1 || name.compare(0, start.size(), start) != 0) continue;
    const int order = name.back() - '0';
    if (order < (reduction == Reduction::kSequenceMax ? 2 : 1) || order > 3) break;
    RejectionRule rule{name, reduction, order, 0, 0};
    const auto bar = threshold.find('_');
    if (order > 1) {
      RLHF_CHECK(bar == std::string::npos, "rejection rule ", name, ": threshold '", threshold,
                 "' must be one upper bound");
      rule.upper = parse_bound(threshold, name);
      return rule;
    }
    // k1 thresholds are ratios; the statistic is a log-ratio.
    const double upper = parse_bound(bar == std::string::npos ? threshold : threshold.substr(bar + 1), name);
    const double lower = bar == std::string::npos ? 1.0 / upper : parse_bound(threshold.substr(0, bar), name);
    rule.lower = std::log(lower);
    rule.upper = std::log(upper);
    return rule;
  }
  fail<InvalidArgument>("unknown rejection rule '", name,
                        "': expected token_k1..3, seq_sum_k1..3, seq_mean_k1..3 or seq_max_k2..3");
}

double divergence(int order, double log_ratio) {
  const double x = std::clamp(log_ratio, -kSafeLogRatio, kSafeLogRatio);
  if (order == 1) return -x;
  if (order == 2) return 0.5 * x * x;
  return std::expm1(x) - x;
}

double reduce_row(const RejectionRule& rule, const TokenRows& rows, std::size_t row,
                  std::span<const double> tokens) {
  const auto count = static_cast<double>(count_tokens(rows, row));
  if (count == 0) return 0;
  if (rule.reduction == Reduction::kSequenceMax) {
    double largest = -std::numeric_limits<double>::infinity();
    for (std::size_t t = rows.begin(row); t < rows.end(row); ++t) {
      if (rows.counts(t)) largest = std::max(largest, tokens[t]);
    }
    return largest;
  }
  const double sum = row_sum(rows, row, tokens);
  return rule.reduction == Reduction::kSequenceSum ? sum : sum / count;
}

struct Statistic {
  std::vector<double> tokens;  ///< per position; constant over a row for sequence rules
  std::vector<double> rows;    ///< per row with tokens
};

Statistic statistic_of(const RejectionRule& rule, const RolloutCorrectionInputs& in) {
  const TokenRows& rows = in.rows;
  Statistic s;
  s.tokens.resize(rows.positions());
  for (std::size_t t = 0; t < s.tokens.size(); ++t) {
    s.tokens[t] = divergence(rule.order, in.old_log_probs[t] - in.rollout_log_probs[t]);
  }
  for (std::size_t row = 0; row < rows.rows(); ++row) {
    const double value = reduce_row(rule, rows, row, s.tokens);
    if (rule.reduction != Reduction::kToken) {
      for (std::size_t t = rows.begin(row); t < rows.end(row); ++t) s.tokens[t] = value;
    }
    if (count_tokens(rows, row) == 0) continue;
    const auto count = static_cast<double>(count_tokens(rows, row));
    s.rows.push_back(rule.reduction == Reduction::kToken ? row_sum(rows, row, s.tokens) / count : value);
  }
  return s;
}

template <class Predicate>
double share(std::span<const double> values, Predicate predicate) {
  if (values.empty()) return 0;
  return static_cast<double>(std::count_if(values.begin(), values.end(), predicate)) /
         static_cast<double>(values.size());
}

void measure(const RejectionRule& rule, const TokenRows& rows, const Statistic& s,
             std::map<std::string, double>& metrics) {
  const std::string prefix = "rollout_rs_" + rule.name;
  std::vector<double> tokens;
  for (std::size_t t = 0; t < s.tokens.size(); ++t) {
    if (rows.counts(t)) tokens.push_back(s.tokens[t]);
  }
  const auto high = [&](double x) { return x > rule.upper; };
  const auto low = [&](double x) { return rule.order == 1 && x < rule.lower; };
  const std::vector<double>& units = rule.reduction == Reduction::kToken ? tokens : s.rows;
  // verl's n + 1e-8: it is what a deviation of equal numbers consists of.
  const double denominator = static_cast<double>(tokens.size()) + 1e-8;
  double token_mean = 0;
  double mean = 0;
  double squares = 0;
  for (const double x : tokens) {
    const double bounded = std::clamp(x, rule.order == 1 ? rule.lower : 0.0, rule.upper);
    token_mean += x / static_cast<double>(tokens.size());
    mean += bounded / denominator;
    squares += bounded * bounded / denominator;
  }
  double row_mean = 0;
  for (const double x : s.rows) row_mean += x / static_cast<double>(s.rows.size());
  double row_squares = 0;
  for (const double x : s.rows) row_squares += (x - row_mean) * (x - row_mean);
  const auto [row_min, row_max] = std::minmax_element(s.rows.begin(), s.rows.end());

  metrics[prefix + "_mean"] = token_mean;
  metrics[prefix + "_max"] = *std::max_element(units.begin(), units.end());
  metrics[prefix + "_min"] = *std::min_element(units.begin(), units.end());
  metrics[prefix + "_fraction_high"] = share(units, high);
  metrics[prefix + "_fraction_low"] = share(units, low);
  metrics[prefix + "_std"] = tokens.size() > 1 ? std::sqrt(std::max(squares - mean * mean, 0.0)) : 0.0;
  metrics[prefix + "_seq_mean"] = row_mean;
  metrics[prefix + "_seq_std"] =
      s.rows.size() > 1 ? std::sqrt(row_squares / static_cast<double>(s.rows.size() - 1)) : 0.0;
  metrics[prefix + "_seq_max"] = *row_max;
  metrics[prefix + "_seq_min"] = *row_min;
  metrics[prefix + "_seq_max_deviation"] = std::max(std::abs(*row_max), std::abs(*row_min));
  metrics[prefix + "_seq_fraction_high"] = share(s.rows, high);
  if (rule.order == 1) metrics[prefix + "_seq_fraction_low"] = share(s.rows, low);
}

// Share of counting tokens, and of responses, that `keep` drops something of.
struct DroppedShares {
  double tokens = 0;
  double sequences = 0;  ///< over responses with tokens
};

DroppedShares dropped_shares(const TokenRows& rows, std::span<const std::uint8_t> keep) {
  std::size_t tokens = 0;
  std::size_t sequences = 0;
  for (std::size_t row = 0; row < rows.rows(); ++row) {
    std::size_t dropped = 0;
    for (std::size_t t = rows.begin(row); t < rows.end(row); ++t) dropped += rows.counts(t) && !keep[t];
    tokens += dropped;
    sequences += dropped > 0;
  }
  return {static_cast<double>(tokens) / static_cast<double>(count_tokens(rows)),
          static_cast<double>(sequences) / static_cast<double>(count_active_rows(rows))};
}

}  // namespace

std::vector<RejectionRule> parse_rejection_rules(const std::string& rules, const std::string& thresholds) {
  std::vector<std::string> names;
  for (const std::string& name : split(rules)) {
    if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
  }
  const std::vector<std::string> bounds = split(thresholds);
  RLHF_CHECK(!names.empty(), "rejection: no rule in '", rules, "'");
  RLHF_CHECK(bounds.size() == 1 || bounds.size() == names.size(), "rejection: ", bounds.size(),
             " thresholds for ", names.size(), " rules; expected one, or one per rule");
  std::vector<RejectionRule> parsed;
  for (std::size_t i = 0; i < names.size(); ++i) {
    parsed.push_back(parse_rule(names[i], bounds.size() == 1 ? bounds[0] : bounds[i]));
  }
  return parsed;
}

std::vector<std::uint8_t> reject_outliers(const std::vector<RejectionRule>& rules,
                                          const RolloutCorrectionInputs& in,
                                          std::map<std::string, double>& metrics) {
  const TokenRows& rows = in.rows;
  std::vector<std::uint8_t> combined(rows.positions(), 1);
  for (const RejectionRule& rule : rules) {
    const Statistic s = statistic_of(rule, in);
    std::vector<std::uint8_t> keep(rows.positions());
    for (std::size_t t = 0; t < keep.size(); ++t) {
      keep[t] = s.tokens[t] <= rule.upper && (rule.order != 1 || s.tokens[t] >= rule.lower);
      combined[t] &= keep[t];
    }
    measure(rule, rows, s, metrics);
    const DroppedShares dropped = dropped_shares(rows, keep);
    metrics["rollout_rs_" + rule.name + "_masked_fraction"] = dropped.tokens;
    metrics["rollout_rs_" + rule.name + "_seq_masked_fraction"] = dropped.sequences;
  }
  const DroppedShares dropped = dropped_shares(rows, combined);
  metrics["rollout_rs_masked_fraction"] = dropped.tokens;
  // Over all responses here, over those with tokens above: the framework's own two denominators.
  metrics["rollout_rs_seq_masked_fraction"] =
      dropped.sequences * static_cast<double>(count_active_rows(rows)) / static_cast<double>(rows.rows());
  for (std::size_t t = 0; t < combined.size(); ++t) combined[t] = combined[t] && rows.counts(t);
  return combined;
}

}  // namespace rlhf::ppo

#include "rlhf/ppo/rollout_correction.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "rlhf/core/error.h"
#include "rlhf/ppo/rollout_rejection.h"

namespace rlhf::ppo {
namespace {

constexpr double kLengthEpsilon = 1e-8;  // verl divides by n + 1e-8
constexpr double kInfinity = std::numeric_limits<double>::infinity();

double bounded(double log_ratio, double bound) {
  return bound > 0 ? std::clamp(log_ratio, -bound, bound) : log_ratio;
}

bool is_sequence(CorrectionLevel level) {
  return level == CorrectionLevel::kSequenceProduct || level == CorrectionLevel::kSequenceGeometric;
}

double row_mean(const TokenRows& rows, std::size_t row, std::span<const double> values) {
  const auto tokens = static_cast<double>(count_tokens(rows, row));
  return tokens > 0 ? row_sum(rows, row, values) / tokens : 0.0;
}

double token_statistic(CorrectionGate gate, double log_ratio, double old_log_prob, double rollout_log_prob) {
  if (gate == CorrectionGate::kRatio) return log_ratio;
  const double p = std::clamp(std::exp(rollout_log_prob), 1e-6, 1 - 1e-6);
  const double q = std::clamp(std::exp(old_log_prob), 1e-6, 1 - 1e-6);
  if (gate == CorrectionGate::kTv) return std::abs(p - q);
  return p * std::log(p / q) + (1 - p) * std::log((1 - p) / (1 - q));
}

struct Weighing {
  std::vector<double> raw;        ///< weight before the bounds, 0 under the mask
  std::vector<double> log_ratio;  ///< per position
  std::vector<double> statistic;  ///< per position, constant over a row at sequence levels
};

Weighing weigh(const RolloutCorrectionOptions& options, const RolloutCorrectionInputs& in) {
  const TokenRows& rows = in.rows;
  Weighing w;
  w.raw.resize(rows.positions());
  w.log_ratio.resize(rows.positions());
  w.statistic.resize(rows.positions());
  for (std::size_t t = 0; t < rows.positions(); ++t) {
    w.log_ratio[t] = in.old_log_probs[t] - in.rollout_log_probs[t];
    w.statistic[t] =
        token_statistic(options.gate, w.log_ratio[t], in.old_log_probs[t], in.rollout_log_probs[t]);
  }
  const std::vector<double> token_statistics = w.statistic;
  for (std::size_t row = 0; row < rows.rows(); ++row) {
    const double product = row_sum(rows, row, w.log_ratio);
    const double mean = row_mean(rows, row, token_statistics);
    for (std::size_t t = rows.begin(row); t < rows.end(row); ++t) {
      const double exponent = options.level == CorrectionLevel::kSequenceProduct ? product : w.log_ratio[t];
      w.raw[t] = rows.counts(t) ? std::exp(bounded(exponent, options.log_ratio_bound)) : 0.0;
      if (options.level == CorrectionLevel::kSequenceGeometric) w.statistic[t] = mean;
      if (options.gate == CorrectionGate::kRatio) {
        w.statistic[t] = options.level == CorrectionLevel::kSequenceGeometric
                             ? std::exp(mean)
                             : std::exp(bounded(exponent, options.log_ratio_bound));
      }
    }
  }
  return w;
}

double apply_bounds(const RolloutCorrectionOptions& options, double raw, double statistic) {
  switch (options.mode) {
    case CorrectionMode::kTruncate:
      return std::min(raw, options.upper);
    case CorrectionMode::kClip:
      return std::clamp(statistic, options.lower, options.upper);
    case CorrectionMode::kMask:
      return statistic >= options.lower && statistic <= options.upper ? raw : 0.0;
  }
  fail<InternalError>("correct_rollout: unknown mode");
}

double share_outside(const RolloutCorrectionOptions& options, const TokenRows& rows,
                     std::span<const double> statistic) {
  const double lower = options.mode == CorrectionMode::kTruncate ? -kInfinity : options.lower;
  const auto outside = [&](std::size_t t) { return statistic[t] < lower || statistic[t] > options.upper; };
  std::vector<double> flags(rows.positions());
  if (!is_sequence(options.level)) {
    for (std::size_t t = 0; t < flags.size(); ++t) flags[t] = outside(t);
    return masked_mean(rows, flags);
  }
  double count = 0;
  for (std::size_t row = 0; row < rows.rows(); ++row)
    count += rows.width(row) > 0 && outside(rows.begin(row));
  return rows.rows() == 0 ? 0.0 : count / static_cast<double>(rows.rows());
}

struct Spread {
  double mean = 0, deviation = 0, min = kInfinity, max = -kInfinity;
};

Spread spread_of(std::span<const double> values) {
  Spread s;
  if (values.empty()) return {0, 0, 0, 0};
  for (const double x : values) {
    s.mean += x / static_cast<double>(values.size());
    s.min = std::min(s.min, x);
    s.max = std::max(s.max, x);
  }
  double squares = 0;
  for (const double x : values) squares += (x - s.mean) * (x - s.mean);
  if (values.size() > 1) s.deviation = std::sqrt(squares / static_cast<double>(values.size() - 1));
  return s;
}

double share(std::span<const double> values, const std::function<bool(double)>& predicate) {
  if (values.empty()) return 0;
  return static_cast<double>(std::count_if(values.begin(), values.end(), predicate)) /
         static_cast<double>(values.size());
}

std::vector<double> row_means(const TokenRows& rows, std::span<const double> values) {
  std::vector<double> means(rows.rows());
  for (std::size_t row = 0; row < rows.rows(); ++row) means[row] = row_mean(rows, row, values);
  return means;
}

std::vector<double> counting(const TokenRows& rows, std::span<const double> values) {
  std::vector<double> kept;
  for (std::size_t t = 0; t < values.size(); ++t) {
    if (rows.counts(t)) kept.push_back(values[t]);
  }
  return kept;
}

void measure_weights(const RolloutCorrectionOptions& options, const TokenRows& rows, const Weighing& w,
                     RolloutCorrectionResult& result) {
  auto& m = result.metrics;
  const double upper = options.upper;
  const double lower = options.mode == CorrectionMode::kTruncate ? 1.0 / upper : options.lower;
  const std::vector<double> applied = counting(rows, result.weights);
  m["rollout_is_mean"] = masked_mean(rows, result.weights);
  if (options.level == CorrectionLevel::kSequenceProduct) {
    std::vector<double> logs(rows.rows());
    for (std::size_t row = 0; row < rows.rows(); ++row) logs[row] = row_sum(rows, row, w.log_ratio);
    const Spread s = spread_of(logs);
    m["rollout_is_max"] = std::exp(std::min(s.max, kSafeLogRatio));
    m["rollout_is_min"] = std::exp(s.min);
    m["rollout_is_ratio_fraction_high"] = share(logs, [&](double x) { return x > std::log(upper); });
    m["rollout_is_ratio_fraction_low"] = share(logs, [&](double x) { return x < std::log(lower); });
  } else {
    const Spread s = spread_of(applied);
    const std::vector<double> raw = counting(rows, w.raw);
    m["rollout_is_max"] = s.max;
    m["rollout_is_min"] = s.min;
    m["rollout_is_ratio_fraction_high"] = share(raw, [&](double x) { return x > upper; });
    m["rollout_is_ratio_fraction_low"] = share(raw, [&](double x) { return x < lower; });
  }
  const double denominator = static_cast<double>(applied.size()) + kLengthEpsilon;
  double mean = 0;
  double squares = 0;
  for (const double weight : applied) {
    const double x = std::clamp(weight, 0.0, upper);
    mean += x / denominator;
    squares += x * x / denominator;
  }
  m["rollout_is_std"] = applied.size() > 1 ? std::sqrt(std::max(squares - mean * mean, 0.0)) : 0.0;
  m["rollout_is_eff_sample_size"] = squares > 0 ? mean * mean / squares : 0.0;
  const std::vector<double> rows_applied = row_means(rows, result.weights);
  const std::vector<double> rows_raw = row_means(rows, w.raw);
  const Spread s = spread_of(rows_applied);
  m["rollout_is_seq_mean"] = s.mean;
  m["rollout_is_seq_std"] = s.deviation;
  m["rollout_is_seq_max"] = s.max;
  m["rollout_is_seq_min"] = s.min;
  m["rollout_is_seq_max_deviation"] = std::max(std::abs(s.max - 1), std::abs(s.min - 1));
  m["rollout_is_seq_fraction_high"] = share(rows_raw, [&](double x) { return x > upper; });
  m["rollout_is_seq_fraction_low"] = share(rows_raw, [&](double x) { return x < lower; });
  if (options.mode == CorrectionMode::kMask) {
    const std::vector<double> raw = counting(rows, w.raw);
    m["rollout_is_oob_ratio"] = share(raw, [&](double x) { return x < lower || x > upper; });
  }
}

void normalize_weights(const RolloutCorrectionOptions& options, const TokenRows& rows,
                       RolloutCorrectionResult& result) {
  double mean = 0;
  if (is_sequence(options.level)) {
    const auto active = static_cast<double>(std::max<std::size_t>(count_active_rows(rows), 1));
    for (std::size_t row = 0; row < rows.rows(); ++row) {
      mean += row_sum(rows, row, result.weights) /
              (static_cast<double>(count_tokens(rows, row)) + kLengthEpsilon) / active;
    }
  } else {
    const auto tokens = static_cast<double>(count_tokens(rows));
    mean = masked_mean(rows, result.weights) * tokens / (tokens + kLengthEpsilon);
  }
  result.metrics["rollout_is_batch_norm_factor"] = mean > 1e-8 ? mean : 1.0;
  if (mean <= 1e-8) return;
  for (double& weight : result.weights) weight /= mean;
}

void measure_mismatch(const RolloutCorrectionInputs& in, std::map<std::string, double>& m) {
  const TokenRows& rows = in.rows;
  const std::vector<double> training = row_means(rows, in.old_log_probs);
  const std::vector<double> rollout = row_means(rows, in.rollout_log_probs);
  const auto batch = static_cast<double>(rows.rows());
  double difference_max = -kInfinity;
  double difference_min = kInfinity;
  for (const char* name :
       {"training_ppl", "training_log_ppl", "rollout_ppl", "rollout_log_ppl", "log_ppl_diff",
        "log_ppl_abs_diff", "ppl_ratio", "chi2_seq", "kl", "k3_kl", "chi2_token"}) {
    m[name] = 0;
  }
  for (std::size_t row = 0; row < rows.rows(); ++row) {
    const double difference = rollout[row] - training[row];
    m["training_ppl"] += std::exp(-training[row]) / batch;
    m["training_log_ppl"] -= training[row] / batch;
    m["rollout_ppl"] += std::exp(-rollout[row]) / batch;
    m["rollout_log_ppl"] -= rollout[row] / batch;
    m["log_ppl_diff"] += difference / batch;
    m["log_ppl_abs_diff"] += std::abs(difference) / batch;
    m["ppl_ratio"] += std::exp(difference) / batch;
    difference_max = std::max(difference_max, difference);
    difference_min = std::min(difference_min, difference);
    const double log_product =
        row_sum(rows, row, in.old_log_probs) - row_sum(rows, row, in.rollout_log_probs);
    m["chi2_seq"] += std::exp(2 * bounded(log_product, kSafeLogRatio)) / batch;
  }
  m["log_ppl_diff_max"] = difference_max;
  m["log_ppl_diff_min"] = difference_min;
  const auto tokens = static_cast<double>(count_tokens(rows));
  for (std::size_t t = 0; t < rows.positions(); ++t) {
    if (!rows.counts(t)) continue;
    const double log_ratio = in.old_log_probs[t] - in.rollout_log_probs[t];
    m["kl"] -= log_ratio / tokens;
    m["k3_kl"] += (std::expm1(log_ratio) - log_ratio) / tokens;
    m["chi2_token"] += std::exp(2 * bounded(log_ratio, kSafeLogRatio)) / tokens;
  }
  m["chi2_token"] -= 1;
  m["chi2_seq"] -= 1;
}

}  // namespace

RolloutCorrectionResult correct_rollout(const RolloutCorrectionOptions& options,
                                        const RolloutCorrectionInputs& in) {
  check_rows(in.rows);
  check_positions(in.rows, in.old_log_probs.size(), "rollout correction: old_log_probs");
  check_positions(in.rows, in.rollout_log_probs.size(), "rollout correction: rollout_log_probs");
  RLHF_CHECK(count_tokens(in.rows) > 0, "rollout correction: no token of the batch counts");
  RLHF_CHECK(options.lower <= options.upper, "rollout correction: lower ", options.lower, " is above upper ",
             options.upper);

  RolloutCorrectionResult result;
  if (options.level != CorrectionLevel::kOff) {
    const Weighing w = weigh(options, in);
    result.weights.resize(in.rows.positions());
    for (std::size_t t = 0; t < result.weights.size(); ++t) {
      if (in.rows.counts(t)) result.weights[t] = apply_bounds(options, w.raw[t], w.statistic[t]);
    }
    result.filtered_fraction = share_outside(options, in.rows, w.statistic);
    measure_weights(options, in.rows, w, result);
    if (options.batch_normalize) normalize_weights(options, in.rows, result);
  }
  if (options.rejection.empty()) {
    result.mask.resize(in.rows.positions());
    for (std::size_t t = 0; t < result.mask.size(); ++t) result.mask[t] = in.rows.counts(t);
  } else {
    result.mask = reject_outliers(parse_rejection_rules(options.rejection, options.rejection_threshold), in,
                                  result.metrics);
  }
  measure_mismatch(in, result.metrics);
  return result;
}

}  // namespace rlhf::ppo

#include "rlhf/verify/record_ppo_statistics.h"

#include <algorithm>

#include "rlhf/core/error.h"

namespace rlhf::verify {
namespace {

constexpr Tolerance kSingle{1e-6, 1e-7};  // float32 numbers in a float64 run

const std::map<std::string, std::string>& metric_tables() {
  static const std::map<std::string, std::string> kTables = {{"policy/approxkl_avg", "approxkl"},
                                                             {"policy/clipfrac_avg", "pg_clipfrac"},
                                                             {"loss/policy_avg", "pg_loss"},
                                                             {"loss/value_avg", "vf_loss"},
                                                             {"val/clipfrac_avg", "vf_clipfrac"},
                                                             {"policy/entropy_avg", "entropy"},
                                                             {"val/ratio", "ratio"}};
  return kTables;
}

double mean_of(const std::vector<double>& values) {
  double sum = 0;
  for (const double value : values) sum += value;
  return sum / static_cast<double>(values.size());
}

double variance_of(const std::vector<double>& values) {
  const double mean = mean_of(values);
  double sum = 0;
  for (const double value : values) sum += (value - mean) * (value - mean);
  return sum / (static_cast<double>(values.size()) - 1);
}

Tolerance wider(Tolerance a, Tolerance b) {
  return {std::max(a.relative, b.relative), std::max(a.absolute, b.absolute)};
}

// Mean over responses of minus the sum of their log-probs: a one-sample estimate of the entropy.
double sampled_entropy(const ppo::Experience& e) {
  double sum = 0;
  const ppo::TokenRows rows{e.offsets, {}};
  for (std::size_t row = 0; row < rows.rows(); ++row) sum -= ppo::row_sum(rows, row, e.old_log_probs);
  return sum / static_cast<double>(rows.rows());
}

}  // namespace

PpoStatistics::PpoStatistics(const PpoRecordOptions& options) : options_(options) {
  const std::size_t size = options.epochs * options.mini_batches * options.accumulation;
  for (const auto& [metric, table] : metric_tables())
    tables_[table] = {std::vector<double>(size), std::vector<std::uint8_t>(size)};
}

std::size_t PpoStatistics::index(const Place& place) const {
  RLHF_CHECK(place.epoch < options_.epochs && place.mini_batch < options_.mini_batches &&
                 place.micro_batch < options_.accumulation,
             "epoch ", place.epoch, ", mini-batch ", place.mini_batch, ", micro-batch ", place.micro_batch,
             " lies outside the tables");
  return (place.epoch * options_.mini_batches + place.mini_batch) * options_.accumulation + place.micro_batch;
}

void PpoStatistics::put(const std::string& table, const Place& place, double value) {
  tables_.at(table).values[index(place)] = value;
  tables_.at(table).unknown[index(place)] = 0;
}

void PpoStatistics::put_unknown(const std::string& table, const Place& place) {
  tables_.at(table).unknown[index(place)] = 1;
}

bool PpoStatistics::complete(const std::string& table) const {
  const auto& unknown = tables_.at(table).unknown;
  return std::find(unknown.begin(), unknown.end(), 1) == unknown.end();
}

void PpoStatistics::check_tables(RecordObject& update, Tolerance tolerance) {
  for (auto& [name, table] : tables_) {
    const std::string key = name + "_stats";
    const Tensor expected = update.tensor(key);
    RLHF_CHECK(expected.shape ==
                   (std::vector<std::size_t>{options_.epochs, options_.mini_batches, options_.accumulation}),
               update.label(), ".", key, " has another shape");
    std::vector<double> actual = table.values;
    for (std::size_t i = 0; i < actual.size(); ++i)
      if (table.unknown[i]) actual[i] = expected.values[i];
    update.check(key, actual, wider(kSingle, tolerance));
  }
}

void PpoStatistics::check_metrics(RecordObject& update, const PpoRollout& rollout, double learning_rate,
                                  std::size_t number, Tolerance tolerance) {
  RecordObject metrics = update.member("metrics");
  const auto& objective = rollout.experience.metrics;
  metrics.check("objective/kl", objective.at("objective/kl"), tolerance);
  metrics.check("objective/entropy", sampled_entropy(rollout.experience), tolerance);
  metrics.check("objective/non_score_reward", objective.at("objective/non_score_reward"), tolerance);
  metrics.check("objective/rlhf_reward", objective.at("objective/rlhf_reward"), tolerance);
  // TRL logs scores after the penalty.
  metrics.check("objective/scores", objective.at("objective/shaped_scores"), tolerance);
  for (const auto& [metric, table] : metric_tables()) {
    if (complete(table)) metrics.check(metric, mean_of(tables_.at(table).values), wider(kSingle, tolerance));
    metrics.ignore(metric);
  }
  metrics.check("val/ratio_var", variance_of(tables_.at("ratio").values), wider(kSingle, tolerance));
  metrics.check_exact("val/num_eos_tokens", rollout.num_end_tokens);
  metrics.check("lr", learning_rate, kRateTolerance);
  metrics.check_exact("episode", static_cast<double>(number * options_.batch));
  metrics.finish();
}

}  // namespace rlhf::verify

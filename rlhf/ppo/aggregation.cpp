#include "rlhf/ppo/aggregation.h"

#include <algorithm>

#include "rlhf/core/error.h"

namespace rlhf::ppo {
namespace {

double widest_row(const TokenRows& rows) {
  std::size_t widest = 0;
  for (std::size_t row = 0; row < rows.rows(); ++row) widest = std::max(widest, rows.width(row));
  return static_cast<double>(widest);
}

double inverse(double x) {
  return x > 0 ? 1.0 / x : 0.0;
}

// Weight of one token before the per-row part; the scope's totals win over those of the rows at hand.
double scope_weight(const AggregationOptions& options, const TokenRows& rows,
                    const AggregationContext& context) {
  const double active_rows = context.total_sequences.value_or(static_cast<double>(count_active_rows(rows)));
  const double scale = options.scale > 0 ? options.scale : context.widest_row.value_or(widest_row(rows));
  switch (options.mode) {
    case Aggregation::kTokenMean:
      return inverse(context.total_tokens.value_or(static_cast<double>(count_tokens(rows))));
    case Aggregation::kTokenSum:
      return 1.0;
    case Aggregation::kSequenceMeanTokenSum:
    case Aggregation::kSequenceMeanTokenMean:
      return inverse(active_rows);
    case Aggregation::kSequenceMeanTokenSumNorm:
      return inverse(active_rows * scale);
    case Aggregation::kConstant:
      return inverse(context.total_sequences.value_or(static_cast<double>(rows.rows())) * scale);
  }
  fail<InternalError>("aggregation: unknown mode");
}

double row_factor(const AggregationOptions& options, double tokens) {
  if (options.mode == Aggregation::kSequenceMeanTokenMean) return inverse(tokens + options.length_epsilon);
  return 1.0;
}

}  // namespace

AggregationContext scope_totals(const AggregationOptions& options, const TokenRows& scope) {
  AggregationContext totals;
  totals.total_tokens = static_cast<double>(count_tokens(scope));
  totals.total_sequences =
      static_cast<double>(options.mode == Aggregation::kConstant ? scope.rows() : count_active_rows(scope));
  totals.widest_row = widest_row(scope);
  return totals;
}

double scope_divisor(const AggregationOptions& options, const AggregationContext& totals) {
  if (options.mode == Aggregation::kTokenSum) return 1;
  const double total = options.mode == Aggregation::kTokenMean ? totals.total_tokens.value_or(1)
                                                               : totals.total_sequences.value_or(1);
  return total > 0 ? total : 1;
}

bool needs_widest_row(const AggregationOptions& options) {
  return options.scale == 0 &&
         (options.mode == Aggregation::kSequenceMeanTokenSumNorm || options.mode == Aggregation::kConstant);
}

std::vector<double> aggregation_weights(const AggregationOptions& options, const TokenRows& rows,
                                        const AggregationContext& context) {
  check_rows(rows);
  RLHF_CHECK(context.micro_batches > 0 && context.data_parallel_size > 0,
             "aggregation: micro_batches and data_parallel_size must be positive, got ",
             context.micro_batches, " and ", context.data_parallel_size);
  const double scope =
      scope_weight(options, rows, context) * context.data_parallel_size / context.micro_batches;
  std::vector<double> weights(rows.positions(), 0.0);
  for (std::size_t row = 0; row < rows.rows(); ++row) {
    const double weight = scope * row_factor(options, static_cast<double>(count_tokens(rows, row)));
    for (std::size_t t = rows.begin(row); t < rows.end(row); ++t) {
      if (rows.counts(t)) weights[t] = weight;
    }
  }
  return weights;
}

double weighted_sum(std::span<const double> weights, std::span<const double> values) {
  RLHF_CHECK(weights.size() == values.size(), "weighted sum: ", weights.size(), " weights for ",
             values.size(), " values");
  double sum = 0;
  for (std::size_t t = 0; t < weights.size(); ++t) {
    if (weights[t] != 0) sum += weights[t] * values[t];
  }
  return sum;
}

}  // namespace rlhf::ppo

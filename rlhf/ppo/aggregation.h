#pragma once

#include <optional>
#include <span>
#include <vector>

#include "rlhf/config/field.h"
#include "rlhf/ppo/rows.h"

namespace rlhf::ppo {

/// How a per-token loss becomes one number. n_b: counting tokens of row b, S: rows with n_b > 0, N: sum of
/// n_b.
enum class Aggregation {
  kTokenMean,                 ///< sum / N
  kTokenSum,                  ///< sum
  kSequenceMeanTokenSum,      ///< sum / S
  kSequenceMeanTokenMean,     ///< mean over S of (row sum / n_b)
  kSequenceMeanTokenSumNorm,  ///< sum / (S * scale): verl's Dr.GRPO form
  kConstant,  ///< sum / (rows * scale), empty rows included: TRL's Dr.GRPO; LUSPO with scale 1
};

struct AggregationOptions {
  Aggregation mode = Aggregation::kTokenMean;
  /// Constant of kSequenceMeanTokenSumNorm and kConstant, usually the longest response allowed; 0 = widest
  /// row.
  double scale = 0;
  /// Added to n_b in kSequenceMeanTokenMean: 1e-8 in verl and OpenRLHF, 0 in TRL.
  double length_epsilon = 0;

  template <class V>
  void visit_fields(V& v) {
    v.choice("mode", mode,
             {{"token_mean", Aggregation::kTokenMean},
              {"token_sum", Aggregation::kTokenSum},
              {"sequence_mean_token_sum", Aggregation::kSequenceMeanTokenSum},
              {"sequence_mean_token_mean", Aggregation::kSequenceMeanTokenMean},
              {"sequence_mean_token_sum_norm", Aggregation::kSequenceMeanTokenSumNorm},
              {"constant", Aggregation::kConstant}},
             "How per-token losses become one number");
    v.field("scale", scale, "Constant normaliser (longest response); 0 = widest response of the batch",
            config::at_least(0));
    v.field("length_epsilon", length_epsilon, "Added to the length in sequence_mean_token_mean",
            config::at_least(0));
  }
};

/// Totals of the scope a loss is normalised over, when that is more than the rows at hand: an optimizer step
/// cut into micro-batches, or a batch spread over processes. Summing the micro-batch losses (and gradients)
/// computed with the same totals gives exactly the loss of the whole scope.
struct AggregationContext {
  std::optional<double> total_tokens;     ///< N of the scope
  std::optional<double> total_sequences;  ///< S of the scope (rows, for kConstant and geometric-mean losses)
  std::optional<double> widest_row;       ///< of the scope, where AggregationOptions::scale is 0
  double data_parallel_size = 1;          ///< factor that undoes gradient averaging over processes
  double micro_batches = 1;               ///< divisor for modes whose scope stays the micro-batch (TRL)
};

/// Totals of a whole scope, for its parts.
AggregationContext scope_totals(const AggregationOptions& options, const TokenRows& scope);
/// How many times larger sums are when they are computed with totals of 1 instead of `totals`: for parts of a
/// scope whose totals are not known yet. 1 for an empty scope.
double scope_divisor(const AggregationOptions& options, const AggregationContext& totals);
/// True when the normaliser needs the widest row, which scope_divisor does not make up for.
bool needs_widest_row(const AggregationOptions& options);

/// Weight w_t of each position, 0 where the mask is 0: aggregated loss = sum_t w_t loss_t, and w_t is its
/// derivative. A scope without tokens gives zero weights. @throws InvalidArgument on inconsistent rows.
std::vector<double> aggregation_weights(const AggregationOptions& options, const TokenRows& rows,
                                        const AggregationContext& context = {});

/// sum_t weights_t values_t over positions with non-zero weight, so that garbage under the mask cannot reach
/// it.
double weighted_sum(std::span<const double> weights, std::span<const double> values);

}  // namespace rlhf::ppo

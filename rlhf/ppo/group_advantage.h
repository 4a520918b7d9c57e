#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "rlhf/config/field.h"
#include "rlhf/ppo/rows.h"

namespace rlhf::ppo {

/// What is subtracted from the score of a response.
enum class GroupBaseline {
  kNone,
  kMean,            ///< mean of its group (GRPO, Dr.GRPO, REINFORCE++-baseline, GPG)
  kLeaveOneOut,     ///< mean of the others of its group (RLOO)
  kLengthWeighted,  ///< length-weighted mean of its group (OPO)
  kBestOfGroup,     ///< best response: best - second best; all others 0 (pass@k)
  kBatchMean,       ///< mean of the whole batch (FlashREINFORCE)
};

/// What the difference is divided by. Deviations are unbiased (n - 1).
enum class GroupScale {
  kNone,
  kGroup,      ///< deviation of the group + epsilon
  kGroupMean,  ///< mean of the positive parts of the group's scores + epsilon; advantages 0 where that mean
               ///< is 0 (MaxRL, arXiv 2602.02710: hard prompts weigh like 1 / pass rate, as in maximum
               ///< likelihood). Partial credit needs an epsilon about as large, or it weighs like success
  kBatch,      ///< deviation of all scores + epsilon
  kNonZeroShare,  ///< share of responses with a non-zero score (GPG)
};

/// A group with one response has no baseline of its own.
enum class SingletonGroups {
  kKeepScore,  ///< baseline 0, deviation 1 (verl)
  kZero,       ///< advantage 0 (TRL, verl's vectorised RLOO)
};

enum class GroupPrecision {
  kDouble,
  kSingle,  ///< sums and deviations in float32 from sum and sum of squares (verl's grpo_vectorized)
};

struct GroupOptions {
  GroupBaseline baseline = GroupBaseline::kMean;
  GroupScale scale = GroupScale::kGroup;
  double epsilon = 1e-6;  ///< added to the deviation or mean: verl 1e-6, TRL 1e-4, OpenRLHF 1e-9
  SingletonGroups singletons = SingletonGroups::kKeepScore;
  GroupPrecision precision = GroupPrecision::kDouble;

  template <class V>
  void visit_fields(V& v) {
    v.choice("baseline", baseline,
             {{"none", GroupBaseline::kNone},
              {"mean", GroupBaseline::kMean},
              {"leave_one_out", GroupBaseline::kLeaveOneOut},
              {"length_weighted", GroupBaseline::kLengthWeighted},
              {"best_of_group", GroupBaseline::kBestOfGroup},
              {"batch_mean", GroupBaseline::kBatchMean}},
             "What is subtracted from the score of a response");
    v.choice("scale", scale,
             {{"none", GroupScale::kNone},
              {"group", GroupScale::kGroup},
              {"group_mean", GroupScale::kGroupMean},
              {"batch", GroupScale::kBatch},
              {"non_zero_share", GroupScale::kNonZeroShare}},
             "What the difference is divided by");
    v.field("epsilon", epsilon, "Added to the deviation, or to the mean of scale: group_mean",
            config::at_least(0));
    v.choice("singletons", singletons,
             {{"keep_score", SingletonGroups::kKeepScore}, {"zero", SingletonGroups::kZero}},
             "Advantage of a response that is alone in its group");
    v.choice("precision", precision,
             {{"double", GroupPrecision::kDouble}, {"single", GroupPrecision::kSingle}},
             "Precision of the group statistics");
  }
};

struct GroupInputs {
  std::span<const double> scores;  ///< per response; NaN = no reward: left out of all statistics, advantage 0
  std::span<const std::uint64_t> groups;  ///< per response: equal numbers share a prompt; any order
  std::span<const double> lengths;        ///< per response: counting tokens; only read by kLengthWeighted
};

/// Advantage of each response within its group. @throws InvalidArgument on sizes that do not fit, on infinite
/// scores (response named) and on groups of fewer than two under kBestOfGroup.
std::vector<double> group_advantages(const GroupOptions& options, const GroupInputs& inputs);

/// How several reward terms become one advantage.
enum class ObjectiveAggregation {
  kSumThenNormalize,  ///< weighted sum of the terms, then group_advantages
  kNormalizeThenSum,  ///< each term within its group, weighted sum, then (x - mean) / (std + epsilon) over
                      ///< the batch
};

struct RewardTerms {
  std::vector<std::vector<double>> terms;  ///< [term][response]; NaN = the term gave no reward
  std::vector<double> weights;             ///< per term; empty = all 1
};

/// Weighted sum of the terms per response; NaN where every term is NaN.
std::vector<double> combine_terms(const RewardTerms& rewards);
/// Advantages from several reward terms (TRL multi_objective_aggregation).
std::vector<double> multi_objective_advantages(const GroupOptions& options, ObjectiveAggregation aggregation,
                                               const RewardTerms& rewards,
                                               std::span<const std::uint64_t> groups);
/// (x - mean) / (std_{n-1} + epsilon) over the values that are not NaN; NaN becomes 0.
std::vector<double> normalize_scores(std::span<const double> values, double epsilon);

/// Repeats one value per response over its counting tokens; 0 elsewhere.
std::vector<double> spread_over_tokens(const TokenRows& rows, std::span<const double> row_values);

/// True for each response whose group has at least two different scores: what DAPO's dynamic sampling keeps.
std::vector<std::uint8_t> groups_with_spread(std::span<const double> scores,
                                             std::span<const std::uint64_t> groups);

/// Which tokens of different responses share a baseline.
enum class TokenAlignment {
  kPosition,     ///< equal position in the response, holes included (verl optimal_token_baseline)
  kTokenNumber,  ///< equal number among the counting tokens (verl tir_optimal_token_baseline)
};
/// What happens where only the longest response of a group still runs.
enum class LoneTail { kOwnBaseline, kNoBaseline };

struct TokenBaselineInputs {
  TokenRows rows;
  std::span<const double> rewards;         ///< per position
  std::span<const std::uint64_t> groups;   ///< per row
  std::span<const double> old_log_probs;   ///< per position
  std::span<const double> sum_pi_squared;  ///< per position: sum over the vocabulary of squared probabilities
  std::span<const double> importance_weights;  ///< per position, or empty
  TokenAlignment alignment = TokenAlignment::kPosition;
  LoneTail tail = LoneTail::kNoBaseline;
};

struct TokenBaselineResult {
  std::vector<double> advantages;  ///< per position
  std::vector<double> returns;     ///< per position: undiscounted reward-to-go over counting tokens
};

/// Variance-optimal baseline per token: b_t = sum_i G_it W_it / sum_i W_it over the group, where W_it is the
/// sum over tokens up to t of 1 - 2 pi + sum pi^2, the squared norm of the score in logit space. @throws
/// InvalidArgument.
TokenBaselineResult optimal_token_baseline(const TokenBaselineInputs& inputs);

}  // namespace rlhf::ppo

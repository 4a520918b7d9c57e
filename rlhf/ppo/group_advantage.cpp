#include "rlhf/ppo/group_advantage.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>

#include "rlhf/core/error.h"

namespace rlhf::ppo {
namespace {

struct Statistics {
  std::size_t count = 0;
  double sum = 0;
  double mean = 0;
  double deviation = 0;      ///< unbiased; 0 for fewer than two
  double positive_mean = 0;  ///< of max(score, 0)
  double length_sum = 0;
  double weighted_sum = 0;  ///< sum of length * score
};

using Members = std::map<std::uint64_t, std::vector<std::size_t>>;

// Members with a score, in the order of the batch.
Members members_of(const GroupInputs& in) {
  Members members;
  for (std::size_t i = 0; i < in.scores.size(); ++i) {
    if (!std::isnan(in.scores[i])) members[in.groups[i]].push_back(i);
  }
  return members;
}

Statistics double_statistics(const GroupInputs& in, std::span<const std::size_t> members) {
  Statistics s;
  s.count = members.size();
  for (const std::size_t i : members) {
    s.sum += in.scores[i];
    s.positive_mean += std::max(in.scores[i], 0.0) / static_cast<double>(s.count);
    if (in.lengths.empty()) continue;
    s.length_sum += in.lengths[i];
    s.weighted_sum += in.lengths[i] * in.scores[i];
  }
  if (s.count == 0) return s;
  s.mean = s.sum / static_cast<double>(s.count);
  if (s.count < 2) return s;
  double squares = 0;
  for (const std::size_t i : members) squares += (in.scores[i] - s.mean) * (in.scores[i] - s.mean);
  s.deviation = std::sqrt(squares / static_cast<double>(s.count - 1));
  return s;
}

Statistics single_statistics(const GroupInputs& in, std::span<const std::size_t> members) {
  float sum = 0;
  float squares = 0;
  float positive = 0;
  for (const std::size_t i : members) {
    const auto score = static_cast<float>(in.scores[i]);
    sum += score;
    squares += score * score;
    positive += std::max(score, 0.0F);
  }
  const auto count = static_cast<float>(members.size());
  const float variance = (squares - sum * sum / std::max(count, 1.0F)) / std::max(count - 1.0F, 1.0F);
  Statistics s;
  s.count = members.size();
  s.sum = sum;
  s.mean = sum / std::max(count, 1.0F);
  s.deviation = std::sqrt(std::max(variance, 0.0F));
  s.positive_mean = positive / std::max(count, 1.0F);
  return s;
}

double baseline_of(const GroupOptions& options, const Statistics& group, const Statistics& batch,
                   double score) {
  switch (options.baseline) {
    case GroupBaseline::kNone:
      return 0;
    case GroupBaseline::kMean:
      return group.mean;
    case GroupBaseline::kLeaveOneOut:
      return (group.sum - score) / static_cast<double>(group.count - 1);
    case GroupBaseline::kLengthWeighted:
      return group.length_sum > 0 ? group.weighted_sum / group.length_sum : 0.0;
    case GroupBaseline::kBatchMean:
      return batch.mean;
    case GroupBaseline::kBestOfGroup:
      break;
  }
  fail<InternalError>("group_advantages: baseline ", static_cast<int>(options.baseline),
                      " has no single value");
}

double scale_of(const GroupOptions& options, const Statistics& group, const Statistics& batch,
                double non_zero_share) {
  switch (options.scale) {
    case GroupScale::kNone:
      return 1;
    case GroupScale::kGroup:
      return group.deviation + options.epsilon;
    case GroupScale::kGroupMean:
      return group.positive_mean > 0 ? group.positive_mean + options.epsilon
                                     : std::numeric_limits<double>::infinity();
    case GroupScale::kBatch:
      return batch.deviation + options.epsilon;
    case GroupScale::kNonZeroShare:
      return non_zero_share;
  }
  fail<InternalError>("group_advantages: unknown scale");
}

void best_of_group(const GroupInputs& in, std::span<const std::size_t> members, double scale,
                   std::span<double> out) {
  RLHF_CHECK(members.size() >= 2,
             "group_advantages: best_of_group needs at least 2 responses per group, got ", members.size());
  std::size_t best = members[0];
  for (const std::size_t i : members) {
    if (in.scores[i] > in.scores[best]) best = i;
  }
  double second = -std::numeric_limits<double>::infinity();
  for (const std::size_t i : members) {
    if (i != best) second = std::max(second, in.scores[i]);
  }
  out[best] = (in.scores[best] - second) / scale;
}

bool depends_on_group(GroupBaseline baseline) {
  return baseline != GroupBaseline::kNone && baseline != GroupBaseline::kBatchMean;
}

void check_group_inputs(const GroupOptions& options, const GroupInputs& in) {
  RLHF_CHECK(in.groups.size() == in.scores.size(), "group_advantages: ", in.groups.size(), " group ids for ",
             in.scores.size(), " scores");
  RLHF_CHECK(options.baseline != GroupBaseline::kLengthWeighted || in.lengths.size() == in.scores.size(),
             "group_advantages: ", in.lengths.size(), " lengths for ", in.scores.size(), " scores");
  for (std::size_t i = 0; i < in.scores.size(); ++i) {
    RLHF_CHECK(!std::isinf(in.scores[i]), "group_advantages: the score of response ", i, " is ",
               in.scores[i]);
  }
}

double non_zero_share(std::span<const double> scores) {
  double non_zero = 0;
  for (const double score : scores) non_zero += score != 0;
  return std::max(non_zero, 1.0) / static_cast<double>(scores.size());
}

}  // namespace

std::vector<double> group_advantages(const GroupOptions& options, const GroupInputs& in) {
  check_group_inputs(options, in);
  std::vector<double> advantages(in.scores.size(), 0.0);
  if (in.scores.empty()) return advantages;
  std::vector<std::size_t> everyone;
  for (std::size_t i = 0; i < in.scores.size(); ++i) {
    if (!std::isnan(in.scores[i])) everyone.push_back(i);
  }
  const Statistics batch = double_statistics(in, everyone);
  const double share = non_zero_share(in.scores);
  for (const auto& [id, members] : members_of(in)) {
    const bool single = options.precision == GroupPrecision::kSingle;
    Statistics group = single ? single_statistics(in, members) : double_statistics(in, members);
    const bool alone = members.size() == 1 && options.baseline != GroupBaseline::kBestOfGroup;
    if (alone && depends_on_group(options.baseline) && options.singletons == SingletonGroups::kZero) continue;
    if (alone && options.singletons == SingletonGroups::kKeepScore) group.deviation = 1;
    const double scale = scale_of(options, group, batch, share);
    if (options.baseline == GroupBaseline::kBestOfGroup) {
      best_of_group(in, members, scale, advantages);
      continue;
    }
    for (const std::size_t i : members) {
      const double baseline = alone && depends_on_group(options.baseline)
                                  ? 0.0
                                  : baseline_of(options, group, batch, in.scores[i]);
      advantages[i] = (in.scores[i] - baseline) / scale;
    }
  }
  return advantages;
}

std::vector<double> combine_terms(const RewardTerms& rewards) {
  RLHF_CHECK(!rewards.terms.empty(), "reward terms: none given");
  RLHF_CHECK(rewards.weights.empty() || rewards.weights.size() == rewards.terms.size(),
             "reward terms: ", rewards.weights.size(), " weights for ", rewards.terms.size(), " terms");
  const std::size_t count = rewards.terms.front().size();
  std::vector<double> sums(count, std::numeric_limits<double>::quiet_NaN());
  for (std::size_t k = 0; k < rewards.terms.size(); ++k) {
    RLHF_CHECK(rewards.terms[k].size() == count, "reward terms: term ", k, " has ", rewards.terms[k].size(),
               " values, term 0 has ", count);
    const double weight = rewards.weights.empty() ? 1.0 : rewards.weights[k];
    for (std::size_t i = 0; i < count; ++i) {
      if (std::isnan(rewards.terms[k][i])) continue;
      sums[i] = (std::isnan(sums[i]) ? 0.0 : sums[i]) + weight * rewards.terms[k][i];
    }
  }
  return sums;
}

std::vector<double> normalize_scores(std::span<const double> values, double epsilon) {
  std::vector<std::size_t> present;
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (!std::isnan(values[i])) present.push_back(i);
  }
  const Statistics s = double_statistics({values, {}, {}}, present);
  std::vector<double> normalized(values.size(), 0.0);
  for (const std::size_t i : present) normalized[i] = (values[i] - s.mean) / (s.deviation + epsilon);
  return normalized;
}

std::vector<double> multi_objective_advantages(const GroupOptions& options, ObjectiveAggregation aggregation,
                                               const RewardTerms& rewards,
                                               std::span<const std::uint64_t> groups) {
  const std::vector<double> sums = combine_terms(rewards);
  if (aggregation == ObjectiveAggregation::kSumThenNormalize)
    return group_advantages(options, {sums, groups, {}});
  RewardTerms normalized{{}, rewards.weights};
  for (const auto& term : rewards.terms) {
    normalized.terms.push_back(group_advantages(options, {term, groups, {}}));
    for (std::size_t i = 0; i < term.size(); ++i) {
      if (std::isnan(term[i])) normalized.terms.back()[i] = term[i];
    }
  }
  return normalize_scores(combine_terms(normalized), options.epsilon);
}

std::vector<double> spread_over_tokens(const TokenRows& rows, std::span<const double> row_values) {
  check_rows(rows);
  check_row_values(rows, row_values.size(), "spread_over_tokens");
  std::vector<double> values(rows.positions(), 0.0);
  for (std::size_t row = 0; row < rows.rows(); ++row) {
    for (std::size_t t = rows.begin(row); t < rows.end(row); ++t) {
      if (rows.counts(t)) values[t] = row_values[row];
    }
  }
  return values;
}

std::vector<std::uint8_t> groups_with_spread(std::span<const double> scores,
                                             std::span<const std::uint64_t> groups) {
  RLHF_CHECK(groups.size() == scores.size(), "groups_with_spread: ", groups.size(), " group ids for ",
             scores.size(), " scores");
  std::vector<std::uint8_t> keep(scores.size(), 0);
  for (const auto& [id, members] : members_of({scores, groups, {}})) {
    const bool spread = std::any_of(members.begin(), members.end(),
                                    [&](std::size_t i) { return scores[i] != scores[members.front()]; });
    for (const std::size_t i : members) keep[i] = spread;
  }
  return keep;
}

}  // namespace rlhf::ppo

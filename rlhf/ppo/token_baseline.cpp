#include <algorithm>
#include <cmath>
#include <map>

#include "rlhf/core/error.h"
#include "rlhf/ppo/gae.h"
#include "rlhf/ppo/group_advantage.h"

namespace rlhf::ppo {
namespace {

constexpr double kWeightEpsilon = 1e-8;

// A counting token: where it is, and which baseline it shares.
struct Slot {
  std::size_t position = 0;
  std::size_t column = 0;
  double weight = 0;  ///< sum of score norms up to it
};

std::vector<Slot> row_slots(const TokenBaselineInputs& in, std::size_t row) {
  std::vector<Slot> slots;
  double weight = 0;
  for (std::size_t t = in.rows.begin(row); t < in.rows.end(row); ++t) {
    if (!in.rows.counts(t)) continue;
    double norm = 1.0 - 2.0 * std::exp(in.old_log_probs[t]) + in.sum_pi_squared[t];
    if (!in.importance_weights.empty()) norm *= in.importance_weights[t] * in.importance_weights[t];
    weight += norm;
    const bool by_position = in.alignment == TokenAlignment::kPosition;
    slots.push_back({t, by_position ? t - in.rows.begin(row) : slots.size(), weight});
  }
  return slots;
}

// Row that alone is longest, and the second length; no row when two share the lead.
struct Leader {
  std::size_t row = 0;
  std::size_t second = 0;
  bool exists = false;
};

Leader find_leader(const std::vector<std::vector<Slot>>& slots) {
  std::size_t longest = 0;
  for (std::size_t i = 1; i < slots.size(); ++i) {
    if (slots[i].size() > slots[longest].size()) longest = i;
  }
  Leader leader{longest, 0, true};
  for (std::size_t i = 0; i < slots.size(); ++i) {
    if (i != longest) leader.second = std::max(leader.second, slots[i].size());
  }
  leader.exists = slots[longest].size() > leader.second;
  return leader;
}

void subtract_baselines(const TokenBaselineInputs& in, const std::vector<std::vector<Slot>>& slots,
                        TokenBaselineResult& result) {
  std::map<std::size_t, std::pair<double, double>> sums;  // column -> sum of G W, sum of W
  for (const auto& row : slots) {
    for (const Slot& slot : row) {
      sums[slot.column].first += result.returns[slot.position] * slot.weight;
      sums[slot.column].second += slot.weight;
    }
  }
  const Leader leader = find_leader(slots);
  for (std::size_t i = 0; i < slots.size(); ++i) {
    const bool cut = in.tail == LoneTail::kNoBaseline && leader.exists && leader.row == i;
    for (const Slot& slot : slots[i]) {
      if (cut && slot.column >= leader.second) continue;
      const auto& [weighted, weight] = sums[slot.column];
      result.advantages[slot.position] -= weighted / (weight + kWeightEpsilon);
    }
  }
}

}  // namespace

TokenBaselineResult optimal_token_baseline(const TokenBaselineInputs& in) {
  check_rows(in.rows);
  check_row_values(in.rows, in.groups.size(), "token baseline groups");
  check_positions(in.rows, in.old_log_probs.size(), "token baseline old_log_probs");
  check_positions(in.rows, in.sum_pi_squared.size(), "token baseline sum_pi_squared");
  if (!in.importance_weights.empty()) {
    check_positions(in.rows, in.importance_weights.size(), "token baseline importance_weights");
  }
  TokenBaselineResult result;
  result.returns = compute_reward_to_go(1.0, MaskHandling::kZero, in.rows, in.rewards);
  result.advantages = result.returns;
  std::map<std::uint64_t, std::vector<std::vector<Slot>>> groups;
  for (std::size_t row = 0; row < in.rows.rows(); ++row) {
    std::vector<Slot> slots = row_slots(in, row);
    if (slots.empty() && in.alignment == TokenAlignment::kTokenNumber) continue;
    groups[in.groups[row]].push_back(std::move(slots));
  }
  for (const auto& [id, slots] : groups) {
    if (slots.size() > 1) subtract_baselines(in, slots, result);
  }
  for (std::size_t t = 0; t < result.advantages.size(); ++t) {
    if (!in.rows.counts(t)) result.advantages[t] = 0;
  }
  return result;
}

}  // namespace rlhf::ppo

#include "rlhf/ppo/gae.h"

#include <algorithm>

namespace rlhf::ppo {
namespace {

double row_lambda(const GaeOptions& options, const TokenRows& rows, std::size_t row) {
  if (options.length_adaptive_alpha <= 0) return options.lambda;
  const auto tokens = static_cast<double>(count_tokens(rows, row));
  if (tokens == 0) return options.lambda;
  return std::max(0.0, 1.0 - 1.0 / (options.length_adaptive_alpha * tokens));
}

}  // namespace

AdvantagesAndReturns compute_gae(const GaeOptions& options, const GaeInputs& inputs) {
  const TokenRows& rows = inputs.rows;
  check_rows(rows);
  check_positions(rows, inputs.rewards.size(), "GAE rewards");
  check_positions(rows, inputs.values.size(), "GAE values");
  if (!inputs.bootstrap.empty()) check_row_values(rows, inputs.bootstrap.size(), "GAE bootstrap values");

  AdvantagesAndReturns result;
  result.advantages.resize(rows.positions());
  result.returns.resize(rows.positions());
  for (std::size_t row = 0; row < rows.rows(); ++row) {
    const double lambda = row_lambda(options, rows, row);
    double next_value = inputs.bootstrap.empty() ? 0.0 : inputs.bootstrap[row];
    double running = 0;
    for (std::size_t t = rows.end(row); t-- > rows.begin(row);) {
      const bool counts = rows.counts(t);
      const double kept = options.mask == MaskHandling::kZero && !counts ? 0.0 : 1.0;
      const double reward = kept * inputs.rewards[t];
      const double value = kept * inputs.values[t];
      if (options.mask != MaskHandling::kCarry || counts) {
        running = reward + options.gamma * next_value - value + options.gamma * lambda * running;
        next_value = value;
      }
      result.advantages[t] = running;
      result.returns[t] = running + value;
    }
  }
  return result;
}

std::vector<double> compute_reward_to_go(double gamma, MaskHandling mask, const TokenRows& rows,
                                         std::span<const double> rewards) {
  check_rows(rows);
  check_positions(rows, rewards.size(), "reward-to-go");
  std::vector<double> returns(rewards.size());
  for (std::size_t row = 0; row < rows.rows(); ++row) {
    double running = 0;
    for (std::size_t t = rows.end(row); t-- > rows.begin(row);) {
      const bool counts = rows.counts(t);
      if (mask == MaskHandling::kCarry && !counts) {
        returns[t] = 0;
        continue;
      }
      const double reward = mask == MaskHandling::kZero && !counts ? 0.0 : rewards[t];
      running = reward + gamma * running;
      returns[t] = running;
    }
  }
  return returns;
}

}  // namespace rlhf::ppo

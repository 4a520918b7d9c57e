#pragma once

#include <span>
#include <vector>

#include "rlhf/config/field.h"
#include "rlhf/ppo/rows.h"

namespace rlhf::ppo {

/// What a position that does not count (a tool result inside a response, padding) does to the recursion.
enum class MaskHandling {
  kIgnore,  ///< nothing: the recursion runs over every position (TRL)
  kZero,    ///< its reward and value count as 0, one step of gamma is still paid (OpenRLHF)
  kCarry,   ///< it is skipped: next value and running sum pass through unchanged (verl, AReaL)
};

struct GaeOptions {
  double gamma = 1.0;    ///< discount, [0, 1]
  double lambda = 0.95;  ///< GAE lambda, [0, 1]
  MaskHandling mask = MaskHandling::kCarry;
  /// alpha of the length-adaptive lambda 1 - 1 / (alpha * tokens) (VAPO, eq. 9); 0 uses `lambda`.
  double length_adaptive_alpha = 0;
  /// A response that was cut goes on from the critic's value of its last state instead of ending with 0.
  bool bootstrap_truncated = false;

  template <class V>
  void visit_fields(V& v) {
    v.field("gamma", gamma, "Discount per token", config::fraction());
    v.field("lambda", lambda, "GAE lambda", config::fraction());
    v.choice(
        "mask", mask,
        {{"ignore", MaskHandling::kIgnore}, {"zero", MaskHandling::kZero}, {"carry", MaskHandling::kCarry}},
        "What tokens that the policy did not choose do to the recursion");
    v.field("length_adaptive_alpha", length_adaptive_alpha,
            "alpha of the length-adaptive lambda 1 - 1/(alpha*tokens) (VAPO); 0 turns it off",
            config::at_least(0));
    v.field("bootstrap_truncated", bootstrap_truncated,
            "GAE of a response cut by the length limit goes on from the value of its last state");
  }
};

struct GaeInputs {
  TokenRows rows;
  std::span<const double> rewards;  ///< per position
  std::span<const double> values;   ///< per position: value before the token is emitted
  std::span<const double>
      bootstrap;  ///< per row: value after the last token of a truncated response; empty = 0
};

struct AdvantagesAndReturns {
  std::vector<double> advantages;  ///< per position, not whitened
  std::vector<double> returns;     ///< per position: advantages + values
};

/// Generalised advantage estimation (Schulman et al. 2016): delta_t = r_t + gamma V_{t+1} - V_t,
/// A_t = delta_t + gamma lambda A_{t+1}. @throws InvalidArgument on sizes that do not fit.
AdvantagesAndReturns compute_gae(const GaeOptions& options, const GaeInputs& inputs);

/// Discounted reward-to-go G_t = r_t + gamma G_{t+1}, per position. With kCarry positions that do not count
/// get 0 and cost no discount (verl); with kZero their reward is 0 and the discount is paid (OpenRLHF).
std::vector<double> compute_reward_to_go(double gamma, MaskHandling mask, const TokenRows& rows,
                                         std::span<const double> rewards);

}  // namespace rlhf::ppo

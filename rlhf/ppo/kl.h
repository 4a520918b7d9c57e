#pragma once

#include <cstddef>

#include "rlhf/config/field.h"

namespace rlhf::ppo {

/// Per-token estimators of KL(policy || reference) from d = log pi(y) - log ref(y), y drawn from the policy
/// (Schulman, "Approximating KL divergence", 2020).
enum class KlEstimator {
  kK1,   ///< d: unbiased, high variance, may be negative
  kAbs,  ///< |d|
  kK2,   ///< d^2 / 2: biased, and the only one whose gradient is the gradient of the KL on policy
  kK3,   ///< exp(-d) - 1 + d: unbiased, never negative
};

/// What is differentiated when the KL is part of the loss.
enum class KlGradient {
  kOwn,         ///< the estimator itself
  kK2,          ///< d^2 / 2, the value stays the estimator's ("k3+" of verl; straight-through)
  kWeightedK2,  ///< w d^2 / 2 with w = min(exp(log pi - log pi_old), 10) (OpenRLHF's unbiased_gradient)
};

struct KlEstimatorOptions {
  KlEstimator estimator = KlEstimator::kK1;
  KlGradient gradient = KlGradient::kOwn;
  /// Bound c of the estimate, [-c, c]; outside it the gradient is 0. 0 = no bound (TRL). OpenRLHF bounds
  /// every estimator at 10, verl k3 only.
  double clamp = 0;

  template <class V>
  void visit_fields(V& v) {
    v.choice("estimator", estimator,
             {{"k1", KlEstimator::kK1},
              {"abs", KlEstimator::kAbs},
              {"k2", KlEstimator::kK2},
              {"k3", KlEstimator::kK3}},
             "Per-token estimate of the KL from d = log pi - log ref");
    v.choice("gradient", gradient,
             {{"own", KlGradient::kOwn}, {"k2", KlGradient::kK2}, {"weighted_k2", KlGradient::kWeightedK2}},
             "What is differentiated when the KL is in the loss: the estimator, or d^2/2 behind its value");
    v.field("clamp", clamp, "Bound of the absolute estimate; 0 turns it off", config::at_least(0));
  }
};

/// A per-token value and its derivative with respect to the policy's log-prob.
struct ValueAndGradient {
  double value = 0;
  double gradient = 0;
};

/// Log-probs of one token under the policies that a KL term compares.
struct KlLogProbs {
  double policy = 0;
  double reference = 0;
  double old = 0;  ///< only read by KlGradient::kWeightedK2; equal to `policy` gives weight 1
};

/// Estimates the KL of one token. Never fails; infinite inputs give infinite or clamped values.
ValueAndGradient estimate_kl(const KlEstimatorOptions& options, const KlLogProbs& log_probs);

enum class KlControllerKind { kFixed, kAdaptive };

struct KlControllerOptions {
  KlControllerKind kind = KlControllerKind::kFixed;
  double target = 6.0;     ///< KL the adaptive controller steers to; nats, in the caller's reduction
  double horizon = 10000;  ///< steps over which a 20 % error changes the coefficient by 20 %

  template <class V>
  void visit_fields(V& v) {
    v.choice("kind", kind, {{"fixed", KlControllerKind::kFixed}, {"adaptive", KlControllerKind::kAdaptive}},
             "fixed: the coefficient never changes; adaptive: it follows target");
    v.field("target", target, "KL that the adaptive controller steers to, nats", config::positive());
    v.field("horizon", horizon, "Samples over which the adaptive coefficient reacts", config::positive());
  }
};

/// The KL coefficient of a run (Ziegler et al. 2019, section 2.2): each update multiplies it by
/// 1 + clip(kl / target - 1, -0.2, 0.2) * samples / horizon. Copyable; its state is one number.
class KlController {
 public:
  KlController(const KlControllerOptions& options, double initial_coefficient);

  double coefficient() const { return coefficient_; }
  void restore(double coefficient) { coefficient_ = coefficient; }
  /// Moves the coefficient after a batch of `samples` responses with KL `current_kl`; does nothing when
  /// fixed.
  void update(double current_kl, std::size_t samples);

 private:
  KlControllerOptions options_;
  double coefficient_;
};

}  // namespace rlhf::ppo

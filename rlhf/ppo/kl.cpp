#include "rlhf/ppo/kl.h"

#include <algorithm>
#include <cmath>

#include "rlhf/core/error.h"

namespace rlhf::ppo {
namespace {

constexpr double kWeightCap = 10.0;

ValueAndGradient unbounded(KlEstimator estimator, double d) {
  switch (estimator) {
    case KlEstimator::kK1:
      return {d, 1.0};
    case KlEstimator::kAbs:
      return {std::abs(d), d > 0 ? 1.0 : (d < 0 ? -1.0 : 0.0)};
    case KlEstimator::kK2:
      return {0.5 * d * d, d};
    case KlEstimator::kK3:
      // expm1 keeps the small differences that exp(-d) - 1 would round away.
      return {std::expm1(-d) + d, -std::expm1(-d)};
  }
  fail<InternalError>("estimate_kl: unknown estimator");
}

}  // namespace

ValueAndGradient estimate_kl(const KlEstimatorOptions& options, const KlLogProbs& log_probs) {
  const double d = log_probs.policy - log_probs.reference;
  ValueAndGradient kl = unbounded(options.estimator, d);
  if (options.clamp > 0 && std::abs(kl.value) > options.clamp) {
    kl = {std::clamp(kl.value, -options.clamp, options.clamp), 0.0};
  }
  if (options.gradient == KlGradient::kK2) kl.gradient = d;
  if (options.gradient == KlGradient::kWeightedK2) {
    kl.gradient = d * std::min(std::exp(log_probs.policy - log_probs.old), kWeightCap);
  }
  return kl;
}

KlController::KlController(const KlControllerOptions& options, double initial_coefficient)
    : options_(options), coefficient_(initial_coefficient) {
  RLHF_CHECK(std::isfinite(initial_coefficient), "KL controller: the initial coefficient is ",
             initial_coefficient);
  if (options.kind == KlControllerKind::kAdaptive) {
    RLHF_CHECK(options.target > 0, "KL controller: target is ", options.target, ", expected above 0");
    RLHF_CHECK(options.horizon > 0, "KL controller: horizon is ", options.horizon, ", expected above 0");
  }
}

void KlController::update(double current_kl, std::size_t samples) {
  if (options_.kind == KlControllerKind::kFixed) return;
  const double error = std::clamp(current_kl / options_.target - 1.0, -0.2, 0.2);
  coefficient_ *= 1.0 + error * static_cast<double>(samples) / options_.horizon;
}

}  // namespace rlhf::ppo

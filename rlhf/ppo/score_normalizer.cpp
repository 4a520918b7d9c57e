#include "rlhf/ppo/score_normalizer.h"

#include <cmath>

#include "rlhf/core/error.h"

namespace rlhf::ppo {
namespace {
constexpr double kDeviationEpsilon = 1e-8;
}

void ScoreNormalizer::observe(std::span<const double> scores) {
  if (kind_ == ScoreNormalization::kNone) return;
  if (kind_ == ScoreNormalization::kReference && state_.count > 0) return;
  for (std::size_t i = 0; i < scores.size(); ++i) {
    RLHF_CHECK(std::isfinite(scores[i]), "score normalisation: the score of response ", i, " is ", scores[i]);
    // Welford 1962: exact for constant scores, whatever their size.
    state_.count += 1;
    const double distance = scores[i] - state_.mean;
    state_.mean += distance / state_.count;
    state_.squares += distance * (scores[i] - state_.mean);
  }
}

double ScoreNormalizer::deviation() const {
  return state_.count > 1 ? std::sqrt(state_.squares / (state_.count - 1)) : 0.0;
}

double ScoreNormalizer::normalize(double score) const {
  switch (kind_) {
    case ScoreNormalization::kNone:
      return score;
    case ScoreNormalization::kRunning:
      return (score - state_.mean) / (deviation() + kDeviationEpsilon);
    case ScoreNormalization::kReference:
      return score - state_.mean;
  }
  fail<InternalError>("score normalisation: unknown kind");
}

}  // namespace rlhf::ppo

#pragma once

#include <span>
#include <vector>

#include "rlhf/core/ids.h"
#include "rollout/sampling/filter.h"
#include "rollout/sampling/options.h"

namespace rlhf {

/// A drawn token and what the trainer needs to know about the draw.
struct Draw {
  TokenId token = 0;
  float log_prob = 0;  ///< under exactly the distribution it was drawn from (0 when greedy)
  float raw_log_prob =
      0;  ///< under softmax(logits / temperature), before penalties and filters (greedy: softmax(logits))
  float entropy = 0;  ///< of the distribution it was drawn from, nats (0 when greedy)
};

/// Draws tokens. Holds scratch memory only, so one Sampler per thread; a draw depends on its arguments alone.
class Sampler {
 public:
  /// Draws by inversion: the first kept token, in ascending token order, at which the cumulative probability
  /// exceeds `uniform`, in [0, 1). Greedy takes the largest logit, the lowest token among equals. Three plain
  /// passes over the vocabulary when nothing is filtered: maximum, weights, search.
  /// @throws InvalidArgument on an empty row, NaN logits, or every logit -inf.
  Draw draw(const SamplingOptions& options, const SamplingHistory& history, std::span<const float> logits,
            double uniform);

 private:
  std::vector<float> logits_;
  std::vector<float> weights_;
};

}  // namespace rlhf

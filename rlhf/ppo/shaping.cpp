#include "rlhf/ppo/shaping.h"

#include <algorithm>

#include "rlhf/core/error.h"

namespace rlhf::ppo {

double overlong_penalty(const LengthShapingOptions& options, std::size_t length) {
  if (options.overlong_buffer == 0) return 0;
  const auto buffer = static_cast<double>(options.overlong_buffer);
  double excess = static_cast<double>(length) - (static_cast<double>(options.max_response_tokens) - buffer);
  if (options.overlong_capped) excess = std::min(excess, buffer);
  return excess > 0 ? -excess / buffer * options.overlong_factor : 0.0;
}

std::vector<double> shape_by_length(const LengthShapingOptions& options, const LengthShapingInputs& inputs) {
  RLHF_CHECK(options.overlong_buffer <= options.max_response_tokens, "length shaping: overlong_buffer ",
             options.overlong_buffer, " is longer than max_response_tokens ", options.max_response_tokens);
  RLHF_CHECK(options.overlong_buffer == 0 || inputs.lengths.size() == inputs.scores.size(),
             "length shaping: ", inputs.lengths.size(), " lengths for ", inputs.scores.size(), " scores");
  RLHF_CHECK(!options.truncated_score || inputs.truncated.size() == inputs.scores.size(),
             "length shaping: ", inputs.truncated.size(), " truncation flags for ", inputs.scores.size(),
             " scores");
  RLHF_CHECK(!options.truncated_score || *options.truncated_score <= 1, "length shaping: truncated_score is ",
             *options.truncated_score, ", expected at most 1");
  std::vector<double> shaped(inputs.scores.begin(), inputs.scores.end());
  for (std::size_t i = 0; i < shaped.size(); ++i) {
    if (options.overlong_buffer > 0) shaped[i] += overlong_penalty(options, inputs.lengths[i]);
    if (!options.truncated_score || !inputs.truncated[i]) continue;
    shaped[i] =
        *options.truncated_score < 0 ? *options.truncated_score : shaped[i] * *options.truncated_score;
  }
  return shaped;
}

}  // namespace rlhf::ppo

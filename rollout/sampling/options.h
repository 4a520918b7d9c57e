#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>

#include "rlhf/config/field.h"

namespace rlhf {

/// How the next token is drawn from a row of logits. Filters run in transformers' order: logit bias, presence
/// and frequency penalty, repetition penalty, temperature, top-k, top-p, min-p; a filter at its off value is
/// skipped.
struct SamplingOptions {
  double temperature = 1.0;  ///< logits are divided by it; 0 takes the most probable token (greedy)
  std::size_t top_k = 0;     ///< keeps the k largest logits and all that tie with the k-th; 0 = off
  double top_p = 1.0;  ///< keeps the smallest set of largest probabilities whose sum reaches it; 1 = off
  std::optional<double> min_p;  ///< keeps probabilities of at least min_p times the largest; none = off
  double repetition_penalty =
      1.0;                      ///< logits of earlier tokens: divided when positive, multiplied when negative
  double presence_penalty = 0;  ///< taken off the logit of every token generated before
  double frequency_penalty = 0;        ///< taken off once per earlier occurrence among the generated tokens
  std::size_t min_tokens_to_keep = 1;  ///< top-k, top-p and min-p keep at least so many

  template <class V>
  void visit_fields(V& v) {
    v.field("temperature", temperature, "Divisor of the logits; 0 = greedy", config::at_least(0));
    v.field("top_k", top_k, "Keep the k largest logits; 0 = off");
    v.field("top_p", top_p, "Keep the smallest set of probabilities that reaches this sum; 1 = off",
            config::fraction());
    v.field("min_p", min_p, "Keep probabilities of at least this times the largest; none = off",
            config::fraction());
    v.field("repetition_penalty", repetition_penalty,
            "Divides (or multiplies) logits of earlier tokens; 1 = off", config::positive());
    v.field("presence_penalty", presence_penalty, "Taken off logits of tokens generated before; 0 = off");
    v.field("frequency_penalty", frequency_penalty, "Taken off per earlier occurrence; 0 = off");
    v.field("min_tokens_to_keep", min_tokens_to_keep, "Least number of tokens the filters keep",
            config::at_least(1));
  }
};

/// True when drawing is an argmax: temperature 0 (penalties may still apply).
inline bool is_greedy(const SamplingOptions& options) {
  return options.temperature == 0;
}
/// True when no filter removes a token.
inline bool keeps_all(const SamplingOptions& options) {
  return options.top_k == 0 && options.top_p >= 1 && !options.min_p.has_value();
}
/// True when a logit depends on earlier tokens' number or presence.
inline bool has_penalties(const SamplingOptions& options) {
  return options.repetition_penalty != 1 || options.presence_penalty != 0 || options.frequency_penalty != 0;
}

}  // namespace rlhf

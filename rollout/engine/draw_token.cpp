#include "rollout/engine/draw_token.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "rlhf/core/error.h"
#include "rlhf/core/random.h"
#include "rollout/sampling/sampler.h"

namespace rlhf {
namespace {

constexpr float kImpossible = -std::numeric_limits<float>::infinity();

bool has_penalties(const SamplingOptions& sampling) {
  return sampling.repetition_penalty != 1 || sampling.presence_penalty != 0 ||
         sampling.frequency_penalty != 0;
}

bool stop_is_early(const DrawContext& context) {
  const StopOptions& stop = context.request.stop;
  return !stop.tokens.empty() && static_cast<std::int64_t>(context.generated.size()) < stop.min_new_tokens;
}

bool is_constrained(const DrawContext& context) {
  return stop_is_early(context) || context.choices || !context.request.constraint.allowed_tokens.empty();
}

// The row with every token impossible that the request forbids here.
std::span<const float> constrain(const DrawContext& context, std::span<const float> logits,
                                 std::vector<float>& row) {
  const GenerationRequest& request = context.request;
  const auto allow = [&](TokenId token) {
    row[static_cast<std::size_t>(token)] = logits[static_cast<std::size_t>(token)];
  };
  if (context.choices || !request.constraint.allowed_tokens.empty()) {
    row.assign(logits.size(), kImpossible);
    for (TokenId token : request.constraint.allowed_tokens) allow(token);
    if (context.choices) {
      for (const auto& [token, node] : context.choices->next(context.node)) allow(token);
      if (context.choices->ends(context.node)) std::ranges::for_each(request.stop.tokens, allow);
    }
  } else {
    row.assign(logits.begin(), logits.end());
  }
  if (stop_is_early(context))
    for (TokenId token : request.stop.tokens) row[static_cast<std::size_t>(token)] = kImpossible;
  return row;
}

std::vector<TokenLogProb> most_probable(std::span<const float> logits, std::int64_t count, double scale,
                                        const kernels::LogitsRow& row) {
  std::vector<TokenId> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  const auto logit = [&](TokenId token) { return logits[static_cast<std::size_t>(token)]; };
  std::partial_sort(order.begin(), order.begin() + count, order.end(), [&](TokenId a, TokenId b) {
    return logit(a) > logit(b) || (logit(a) == logit(b) && a < b);
  });
  const double log_total = row.lse - row.max;
  std::vector<TokenLogProb> top;
  for (TokenId token : std::span(order).first(static_cast<std::size_t>(count))) {
    const double below = static_cast<double>(logit(token)) - static_cast<double>(logit(order[0]));
    top.push_back({token, static_cast<float>(below * scale - log_total)});
  }
  return top;
}

}  // namespace

bool draws_on_device(const DrawContext& context) {
  const GenerationRequest& request = context.request;
  const SamplingOptions& sampling = request.sampling;
  return !is_constrained(context) && !has_penalties(sampling) && request.constraint.logit_bias.empty() &&
         (is_greedy(sampling) || keeps_all(sampling) || sampling.min_tokens_to_keep <= 1) &&
         request.output.top_logprobs == 0;
}

DrawnToken draw_token(const kernels::Kernels<float>& kernels, const DrawContext& context,
                      std::span<float> logits) {
  const GenerationRequest& request = context.request;
  static thread_local Sampler sampler;
  static thread_local std::vector<float> constrained_row;
  const bool constrained = is_constrained(context);
  std::span<const float> row = logits;
  if (constrained) row = constrain(context, logits, constrained_row);
  SamplingHistory history;
  history.context = context.tokens;
  history.generated = context.generated;
  history.logit_bias = &request.constraint.logit_bias;
  DrawnToken drawn;
  Draw draw;
  try {
    draw = sampler.draw(request.sampling, history, row,
                        uniform_at(request.seed, request.prompt_id, context.sample_index,
                                   static_cast<std::uint32_t>(context.generated.size())));
  } catch (const InvalidArgument&) {
    drawn.log_prob = std::nanf("");
    return drawn;
  }
  drawn.token = draw.token;
  drawn.log_prob = draw.log_prob;
  drawn.entropy = draw.entropy;
  drawn.raw_log_prob = draw.raw_log_prob;
  const bool greedy = is_greedy(request.sampling);
  const bool plain = !constrained && !has_penalties(request.sampling) &&
                     request.constraint.logit_bias.empty() && keeps_all(request.sampling);
  const OutputOptions& output = request.output;
  if (greedy || plain || constrained || output.raw_logprobs || output.top_logprobs > 0) {
    const double scale = greedy ? 1 : 1 / request.sampling.temperature;
    const auto own =
        kernels.logits_row(logits.data(), static_cast<std::int64_t>(logits.size()), scale, 0, draw.token);
    drawn.raw_log_prob = static_cast<float>(own.logprob);
    if (output.top_logprobs > 0) drawn.top = most_probable(logits, output.top_logprobs, scale, own);
  }
  // Where nothing changes the model's distribution, the trainer's kernel gives the log-prob: then sampler and
  // trainer agree bit for bit, and ratios of the first minibatch are exactly 1. A greedy choice has
  // probability 1 under its own distribution; the model's log-prob is what callers can use.
  if (greedy || plain) drawn.log_prob = drawn.raw_log_prob;
  return drawn;
}

}  // namespace rlhf

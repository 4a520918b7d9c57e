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

bool stop_is_early(const DrawContext& context) {
  const StopOptions& stop = context.request.stop;
  return !stop.tokens.empty() && static_cast<std::int64_t>(context.generated.size()) < stop.min_new_tokens;
}

// The row with every token impossible that the limits exclude.
std::span<const float> constrain(const TokenLimits& limits, std::span<const float> logits,
                                 std::vector<float>& row) {
  if (limits.allowed.empty()) {
    row.assign(logits.begin(), logits.end());
  } else {
    row.assign(logits.size(), kImpossible);
    for (TokenId token : limits.allowed)
      row[static_cast<std::size_t>(token)] = logits[static_cast<std::size_t>(token)];
  }
  for (TokenId token : limits.forbidden) row[static_cast<std::size_t>(token)] = kImpossible;
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

TokenLimits limits_of(const DrawContext& context, std::vector<TokenId>& scratch) {
  const GenerationRequest& request = context.request;
  TokenLimits limits;
  limits.allowed = request.constraint.allowed_tokens;
  if (context.choices) {
    scratch.clear();
    for (const auto& [token, node] : context.choices->next(context.node)) scratch.push_back(token);
    if (context.choices->ends(context.node))
      scratch.insert(scratch.end(), request.stop.tokens.begin(), request.stop.tokens.end());
    limits.allowed = scratch;
  }
  if (stop_is_early(context)) limits.forbidden = request.stop.tokens;
  return limits;
}

bool draws_on_device(const DrawContext& context) {
  const SamplingOptions& sampling = context.request.sampling;
  return (is_greedy(sampling) || keeps_all(sampling) || sampling.min_tokens_to_keep <= 1) &&
         context.request.output.top_logprobs == 0;
}

DrawnToken draw_token(const kernels::Kernels<float>& kernels, const DrawContext& context,
                      std::span<float> logits) {
  const GenerationRequest& request = context.request;
  static thread_local Sampler sampler;
  static thread_local std::vector<float> constrained_row;
  static thread_local std::vector<TokenId> listed;
  const TokenLimits limits = limits_of(context, listed);
  const bool constrained = !limits.allowed.empty() || !limits.forbidden.empty();
  std::span<const float> row = logits;
  if (constrained) row = constrain(limits, logits, constrained_row);
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

#include "rollout/sampling/sampler.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "rlhf/core/error.h"
#include "rlhf/kernels/kernel_table.h"

namespace rlhf {
namespace {

bool changes_logits(const SamplingOptions& options, const SamplingHistory& history) {
  return has_penalties(options) || (history.logit_bias != nullptr && !history.logit_bias->empty());
}

const kernels::Kernels<float>& row_kernels() {
  static const kernels::Kernels<float>& table = kernels::kernels_for<float>(kernels::detect_cpu_isa());
  return table;
}

TokenId argmax(std::span<const float> logits) {
  const float largest = row_kernels().largest(logits.data(), static_cast<std::int64_t>(logits.size()));
  return static_cast<TokenId>(std::find(logits.begin(), logits.end(), largest) - logits.begin());
}

// Sums over a row relative to its largest logit: of e^x and of x e^x.
struct RowSums : kernels::RowWeights {
  double log_mass() const { return std::log(mass); }
  double below_largest(float logit) const { return static_cast<double>(logit - static_cast<float>(largest)); }
  double entropy() const { return log_mass() - moment / mass; }
};

RowSums weigh_row(std::span<const float> logits, float scale, std::span<float> weights) {
  const RowSums sums{
      row_kernels().weigh(logits.data(), static_cast<std::int64_t>(logits.size()), scale, weights.data())};
  RLHF_CHECK(std::isfinite(sums.largest), "sampling: the largest logit is ", sums.largest);
  // The comparisons drop a NaN, the moment does not.
  RLHF_CHECK(std::isfinite(sums.mass) && std::isfinite(sums.moment), "sampling: a logit is NaN");
  return sums;
}

constexpr std::size_t kBlock = 256;

std::size_t invert(std::span<const float> weights, double target) {
  double below = 0;
  std::size_t begin = 0;
  for (; begin + kBlock < weights.size(); begin += kBlock) {
    double block = 0;
    for (std::size_t i = begin; i < begin + kBlock; ++i) block += weights[i];
    if (below + block > target) break;
    below += block;
  }
  std::size_t last = 0;
  for (std::size_t i = begin; i < weights.size(); ++i) {
    if (weights[i] <= 0) continue;
    below += weights[i];
    last = i;
    if (below > target) return i;
  }
  return last;
}

double plain_log_prob(std::span<const float> logits, TokenId token, double scale, std::span<float> scratch) {
  const RowSums sums = weigh_row(logits, static_cast<float>(scale), scratch);
  return sums.below_largest(logits[static_cast<std::size_t>(token)]) * scale - sums.log_mass();
}

Draw draw_unfiltered(std::span<const float> logits, double scale, double uniform, std::span<float> weights) {
  const RowSums sums = weigh_row(logits, static_cast<float>(scale), weights);
  const std::size_t index = invert(weights, uniform * sums.mass);
  Draw draw;
  draw.token = static_cast<TokenId>(index);
  draw.log_prob = static_cast<float>(sums.below_largest(logits[index]) * scale - sums.log_mass());
  draw.entropy = static_cast<float>(sums.entropy());
  return draw;
}

Draw draw_filtered(const std::vector<KeptToken>& kept, double uniform) {
  double largest = -std::numeric_limits<double>::infinity();
  for (const KeptToken& t : kept) largest = std::max(largest, static_cast<double>(t.logit));
  double mass = 0;
  double moment = 0;
  for (const KeptToken& t : kept) {
    const double x = t.logit - largest;
    mass += std::exp(x);
    moment += x * std::exp(x);
  }
  const KeptToken* chosen = &kept.back();
  double below = 0;
  for (const KeptToken& t : kept) {
    below += std::exp(t.logit - largest);
    if (below > uniform * mass) {
      chosen = &t;
      break;
    }
  }
  Draw draw;
  draw.token = chosen->token;
  draw.log_prob = static_cast<float>(chosen->logit - largest - std::log(mass));
  draw.entropy = static_cast<float>(std::log(mass) - moment / mass);
  return draw;
}

}  // namespace

Draw Sampler::draw(const SamplingOptions& options, const SamplingHistory& history,
                   std::span<const float> logits, double uniform) {
  RLHF_CHECK(!logits.empty(), "sampling: an empty row of logits");
  RLHF_CHECK(uniform >= 0 && uniform < 1, "sampling: the uniform draw is ", uniform, ", expected [0, 1)");
  weights_.resize(logits.size());
  const double scale = is_greedy(options) ? 1.0 : 1.0 / options.temperature;
  std::span<const float> row = logits;
  const bool changed = changes_logits(options, history);
  if (changed || (!is_greedy(options) && !keeps_all(options))) {
    logits_.assign(logits.begin(), logits.end());
    apply_penalties(options, history, logits_);
    row = logits_;
  }
  Draw draw;
  if (is_greedy(options)) {
    draw.token = argmax(row);
    draw.raw_log_prob = static_cast<float>(plain_log_prob(logits, draw.token, scale, weights_));
    return draw;
  }
  if (keeps_all(options)) {
    draw = draw_unfiltered(row, scale, uniform, weights_);
    draw.raw_log_prob =
        changed ? static_cast<float>(plain_log_prob(logits, draw.token, scale, weights_)) : draw.log_prob;
    return draw;
  }
  apply_temperature(options, logits_);
  draw = draw_filtered(filter_tokens(options, logits_), uniform);
  draw.raw_log_prob = static_cast<float>(plain_log_prob(logits, draw.token, scale, weights_));
  return draw;
}

}  // namespace rlhf

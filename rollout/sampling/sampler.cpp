#include "rollout/sampling/sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "rlhf/core/error.h"

namespace rlhf {
namespace {

bool changes_logits(const SamplingOptions& options, const SamplingHistory& history) {
  return options.repetition_penalty != 1.0 || options.presence_penalty != 0 ||
         options.frequency_penalty != 0 || (history.logit_bias != nullptr && !history.logit_bias->empty());
}

// Branch-free e^x for x <= 0, relative error below 2e-7: the polynomial vectorises where std::exp does not.
inline float fast_exp(float x) {
  constexpr float kLog2E = 1.44269504088896341F;
  constexpr float kLn2High = 0.693145751953125F;
  constexpr float kLn2Low = 1.42860682030941723e-6F;
  constexpr float kMagic = 12582912.0F;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = x * kLog2E + kMagic;
  const float n = shifted - kMagic;
  const float r = (x - n * kLn2High) - n * kLn2Low;
  float p = 1.9875691500e-4F;
  p = p * r + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  p = p * r * r + r + 1.0F;
  const auto exponent = std::bit_cast<std::int32_t>(shifted) << 23;
  return std::bit_cast<float>(std::bit_cast<std::int32_t>(p) + exponent);
}

float largest_logit(std::span<const float> logits) {
  constexpr std::size_t kLanes = 16;
  float lanes[kLanes];
  std::fill(std::begin(lanes), std::end(lanes), -std::numeric_limits<float>::infinity());
  std::size_t i = 0;
  for (; i + kLanes <= logits.size(); i += kLanes) {
    for (std::size_t k = 0; k < kLanes; ++k) lanes[k] = std::max(lanes[k], logits[i + k]);
  }
  float largest = *std::max_element(std::begin(lanes), std::end(lanes));
  for (; i < logits.size(); ++i) largest = std::max(largest, logits[i]);
  return largest;
}

TokenId argmax(std::span<const float> logits) {
  const float largest = largest_logit(logits);
  return static_cast<TokenId>(std::find(logits.begin(), logits.end(), largest) - logits.begin());
}

// Sums over a row relative to its largest logit: of e^x and of x e^x.
struct RowSums {
  float largest = 0;
  double mass = 0;
  double moment = 0;

  double log_mass() const { return std::log(mass); }
  double entropy() const { return log_mass() - moment / mass; }
};

constexpr std::size_t kBlock = 256;
constexpr float kFloor = -87.0F;  // e^-87 is the smallest normal float

// Writes e^(scale * (logit - largest)) and sums it block by block: floats within a block, doubles across.
RowSums weigh_row(std::span<const float> logits, float scale, std::span<float> weights) {
  RowSums sums;
  sums.largest = largest_logit(logits);
  RLHF_CHECK(std::isfinite(sums.largest), "sampling: the largest logit is ", sums.largest);
  constexpr std::size_t kLanes = 16;
  for (std::size_t begin = 0; begin < logits.size(); begin += kBlock) {
    const std::size_t end = std::min(begin + kBlock, logits.size());
    float mass[kLanes] = {};
    float moment[kLanes] = {};
    std::size_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      for (std::size_t k = 0; k < kLanes; ++k) {
        const float x = std::max((logits[i + k] - sums.largest) * scale, kFloor);
        // A logit of -inf must have weight 0, not e^-87.
        const float w = x > kFloor ? fast_exp(x) : 0.0F;
        weights[i + k] = w;
        mass[k] += w;
        moment[k] += w * x;
      }
    }
    for (; i < end; ++i) {
      const float x = std::max((logits[i] - sums.largest) * scale, kFloor);
      weights[i] = x > kFloor ? fast_exp(x) : 0.0F;
      mass[0] += weights[i];
      moment[0] += weights[i] * x;
    }
    for (std::size_t k = 0; k < kLanes; ++k) {
      sums.mass += mass[k];
      sums.moment += moment[k];
    }
  }
  // The comparisons drop a NaN, the moment does not.
  RLHF_CHECK(std::isfinite(sums.mass) && std::isfinite(sums.moment), "sampling: a logit is NaN");
  return sums;
}

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
  return (logits[static_cast<std::size_t>(token)] - sums.largest) * scale - sums.log_mass();
}

Draw draw_unfiltered(std::span<const float> logits, double scale, double uniform, std::span<float> weights) {
  const RowSums sums = weigh_row(logits, static_cast<float>(scale), weights);
  const std::size_t index = invert(weights, uniform * sums.mass);
  Draw draw;
  draw.token = static_cast<TokenId>(index);
  draw.log_prob = static_cast<float>((logits[index] - sums.largest) * scale - sums.log_mass());
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

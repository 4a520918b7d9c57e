#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "rlhf/core/error.h"
#include "rlhf/core/random.h"
#include "rollout/sampling/sampler.h"
#include "tests/catch.h"

using namespace rlhf;

namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

const std::vector<float> kLogits = {0.3F, -1.2F, 2.1F,  2.1F, 0.0F,           -4.0F,
                                    1.7F, 0.9F,  -0.5F, 1.2F, kMinusInfinity, -2.0F};

// The distribution by the definition of each filter, with a full sort: penalties, temperature, top-k, top-p,
// min-p, in this order.
std::vector<double> distribution(const SamplingOptions& options, const SamplingHistory& history,
                                 const std::vector<float>& logits) {
  std::vector<double> z(logits.begin(), logits.end());
  for (std::size_t v = 0; v < z.size(); ++v) {
    const auto token = static_cast<TokenId>(v);
    if (history.logit_bias && history.logit_bias->contains(token))
      z[v] += static_cast<double>(history.logit_bias->at(token));
    const auto count = std::ranges::count(history.generated, token);
    if (count > 0) z[v] -= options.presence_penalty + options.frequency_penalty * static_cast<double>(count);
    if (std::ranges::find(history.context, token) != history.context.end())
      z[v] = z[v] < 0 ? z[v] * options.repetition_penalty : z[v] / options.repetition_penalty;
    z[v] /= options.temperature;
  }
  std::vector<double> p(z.size());
  const auto normalise = [&] {
    const double total = std::accumulate(p.begin(), p.end(), 0.0);
    for (double& value : p) value /= total;
  };
  for (std::size_t v = 0; v < z.size(); ++v) p[v] = std::exp(z[v]);
  normalise();
  std::vector<double> sorted = p;
  std::ranges::sort(sorted, std::greater<>());
  if (options.top_k > 0 && options.top_k < p.size()) {
    const double least = sorted[options.top_k - 1];
    for (double& value : p)
      if (value < least) value = 0;
    normalise();
  }
  if (options.top_p < 1) {
    std::vector<std::size_t> order(p.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::ranges::stable_sort(order, [&](std::size_t a, std::size_t b) { return p[a] > p[b]; });
    double above = 0;
    for (std::size_t v : order) {
      const double value = p[v];
      if (above >= options.top_p) p[v] = 0;
      above += value;
    }
    normalise();
  }
  if (options.min_p) {
    const double largest = *std::ranges::max_element(p);
    for (double& value : p)
      if (value < *options.min_p * largest) value = 0;
    normalise();
  }
  return p;
}

// Value that a chi-square variable of `freedom` degrees exceeds with probability 1e-4 (Wilson & Hilferty
// 1931).
double chi_square_limit(double freedom) {
  const double a = 2 / (9 * freedom);
  return freedom * std::pow(1 - a + 3.719 * std::sqrt(a), 3);
}

void check_distribution(const SamplingOptions& options, const SamplingHistory& history) {
  const std::vector<double> expected = distribution(options, history, kLogits);
  constexpr std::uint32_t kDraws = 20000;
  std::vector<double> counts(kLogits.size());
  Sampler sampler;
  double entropy = 0;
  for (double p : expected)
    if (p > 0) entropy -= p * std::log(p);
  double log_prob_error = 0, entropy_error = 0;
  for (std::uint32_t i = 0; i < kDraws; ++i) {
    const Draw draw = sampler.draw(options, history, kLogits, uniform_at(7, 3, i / 100, i % 100));
    const auto token = static_cast<std::size_t>(draw.token);
    REQUIRE(token < kLogits.size());
    ++counts[token];
    log_prob_error =
        std::max(log_prob_error, std::abs(static_cast<double>(draw.log_prob) - std::log(expected[token])));
    entropy_error = std::max(entropy_error, std::abs(static_cast<double>(draw.entropy) - entropy));
  }
  double statistic = 0, freedom = -1;
  for (std::size_t v = 0; v < expected.size(); ++v) {
    INFO("token " << v);
    if (expected[v] == 0) {
      CHECK(counts[v] == 0);
      continue;
    }
    const double mean = kDraws * expected[v];
    statistic += (counts[v] - mean) * (counts[v] - mean) / mean;
    ++freedom;
  }
  if (freedom > 0) CHECK(statistic < chi_square_limit(freedom));
  // Floats near 4 and a polynomial exponential: a few 1e-7.
  CHECK(log_prob_error < 2e-6);
  CHECK(entropy_error < 2e-6);
}

}  // namespace

TEST_CASE("draws follow the filtered distribution and carry its log-probs (seed 7)") {
  SamplingOptions options;
  SamplingHistory history;
  const std::vector<TokenId> context = {2, 5, 2, 9, 1}, generated = {2, 9, 2};
  const std::unordered_map<TokenId, float> bias = {{1, 3.0F}, {6, -1.0F}};
  SECTION("plain") {
    check_distribution(options, history);
  }
  SECTION("temperature") {
    for (double temperature : {0.5, 0.7, 1.8}) {
      options.temperature = temperature;
      check_distribution(options, history);
    }
  }
  SECTION("top-k, with a tie at the border") {
    for (std::size_t k : {1u, 2u, 3u, 5u, 50u}) {
      options.top_k = k;
      check_distribution(options, history);
    }
  }
  SECTION("top-p") {
    for (double p : {0.05, 0.5, 0.8, 0.95}) {
      options.top_p = p;
      check_distribution(options, history);
    }
  }
  SECTION("min-p") {
    for (double p : {0.05, 0.4, 1.0}) {
      options.min_p = p;
      check_distribution(options, history);
    }
  }
  SECTION("penalties and bias") {
    history.context = context;
    history.generated = generated;
    options.repetition_penalty = 1.3;
    check_distribution(options, history);
    options.presence_penalty = 0.4;
    options.frequency_penalty = 0.6;
    check_distribution(options, history);
    history.logit_bias = &bias;
    check_distribution(options, history);
  }
  SECTION("everything at once") {
    history.context = context;
    history.generated = generated;
    history.logit_bias = &bias;
    options.repetition_penalty = 1.2;
    options.frequency_penalty = 0.3;
    options.temperature = 0.8;
    options.top_k = 8;
    options.top_p = 0.9;
    options.min_p = 0.1;
    check_distribution(options, history);
  }
}

TEST_CASE("a draw inverts the cumulative distribution in token order") {
  SamplingOptions filtered;
  filtered.top_k = 4;  // tokens 2, 3, 6, 9
  for (const SamplingOptions& options : {SamplingOptions{}, filtered}) {
    const auto p = distribution(options, {}, kLogits);
    Sampler sampler;
    double below = 0;
    std::size_t last = 0;
    for (std::size_t v = 0; v < p.size(); ++v) {
      if (p[v] == 0) continue;
      // Just inside the token's interval at both ends; 1e-6 is above the rounding of the weights.
      CHECK(sampler.draw(options, {}, kLogits, below + 1e-6).token == static_cast<TokenId>(v));
      CHECK(sampler.draw(options, {}, kLogits, below + p[v] - 1e-6).token == static_cast<TokenId>(v));
      below += p[v];
      last = v;
    }
    CHECK(sampler.draw(options, {}, kLogits, 1 - std::ldexp(1.0, -53)).token == static_cast<TokenId>(last));
    CHECK(sampler.draw(options, {}, kLogits, 0).token == (keeps_all(options) ? 0 : 2));
  }
}

TEST_CASE("impossible tokens are never drawn") {
  Sampler sampler;
  for (std::size_t size : {5u, 300u, 1000u}) {
    std::vector<float> logits(size, kMinusInfinity);
    logits[size - 2] = 1;
    logits[1] = 0;
    for (double u : {0.0, 0.2, 0.5, 0.9, 1 - std::ldexp(1.0, -53)}) {
      const Draw draw = sampler.draw({}, {}, logits, u);
      // exp(0) / (exp(0) + exp(1)) = 0.26894
      CHECK(draw.token == static_cast<TokenId>(u < 0.26894 ? 1 : size - 2));
      CHECK(draw.log_prob == Approx(u < 0.26894 ? -1.3132617 : -0.3132617));
      CHECK(draw.raw_log_prob == draw.log_prob);
    }
  }
}

TEST_CASE("greedy takes the largest logit, the lowest token among equals") {
  SamplingOptions greedy;
  greedy.temperature = 0;
  Sampler sampler;
  for (double u : {0.0, 0.99}) {
    const Draw draw = sampler.draw(greedy, {}, kLogits, u);
    CHECK(draw.token == 2);
    CHECK(draw.log_prob == 0);
    CHECK(draw.entropy == 0);
    CHECK(draw.raw_log_prob == Approx(std::log(distribution({}, {}, kLogits)[2])).epsilon(1e-5));
  }
  // A penalty moves the choice; the model's own log-prob stays that of the unpenalised row.
  const std::vector<TokenId> context = {2, 3, 6};
  SamplingHistory history;
  history.context = context;
  greedy.repetition_penalty = 10;
  const Draw draw = sampler.draw(greedy, history, kLogits, 0.5);
  CHECK(draw.token == 9);
  CHECK(draw.raw_log_prob == Approx(std::log(distribution({}, {}, kLogits)[9])).epsilon(1e-5));
}

TEST_CASE("the raw log-prob is that of the row before penalties and filters") {
  SamplingOptions options;
  options.temperature = 0.6;
  SamplingOptions plain = options;
  options.top_k = 2;
  options.presence_penalty = 5;
  const std::vector<TokenId> generated = {2};
  SamplingHistory history;
  history.generated = generated;
  Sampler sampler;
  const auto p = distribution(plain, {}, kLogits);
  for (double u : {0.1, 0.5, 0.9}) {
    const Draw draw = sampler.draw(options, history, kLogits, u);
    CHECK((draw.token == 3 || draw.token == 6));
    CHECK(draw.raw_log_prob == Approx(std::log(p[static_cast<std::size_t>(draw.token)])).epsilon(1e-5));
  }
}

TEST_CASE("penalties change each token once, by numbers computed by hand") {
  SamplingOptions options;
  options.repetition_penalty = 2;
  options.presence_penalty = 0.5;
  options.frequency_penalty = 0.25;
  const std::vector<TokenId> context = {0, 1, 1, 3, 3, 3}, generated = {3, 3, 3};
  const std::unordered_map<TokenId, float> bias = {{2, 1.0F}};
  SamplingHistory history{context, generated, &bias};
  std::vector<float> logits = {4, -1, 0, 2};
  apply_penalties(options, history, logits);
  // Token 3: 2 - 0.5 - 3 * 0.25 = 0.75, then halved.
  CHECK(logits == std::vector<float>{2, -2, 1, 0.375F});
}

TEST_CASE("a draw depends on its arguments alone") {
  std::vector<float> logits(3000);
  RandomStream random(5);
  for (float& logit : logits) logit = static_cast<float>(random.normal());
  SamplingOptions filtered;
  filtered.top_p = 0.9;
  filtered.repetition_penalty = 1.1;
  const std::vector<TokenId> context = {1, 2, 3};
  SamplingHistory history;
  history.context = context;
  Sampler reused;
  for (std::uint32_t position = 0; position < 50; ++position) {
    const double u = uniform_at(1, 2, 3, position);
    CHECK(u == uniform_at(1, 2, 3, position));
    for (const SamplingOptions& options : {SamplingOptions{}, filtered}) {
      reused.draw({}, {}, kLogits, 0.3);  // leaves other scratch behind
      const Draw a = reused.draw(options, history, logits, u),
                 b = Sampler().draw(options, history, logits, u);
      CHECK(a.token == b.token);
      CHECK(a.log_prob == b.log_prob);
      CHECK(a.raw_log_prob == b.raw_log_prob);
      CHECK(a.entropy == b.entropy);
    }
  }
}

TEST_CASE("every coordinate of a draw matters and positions are independent (seed 1)") {
  const double u = uniform_at(1, 2, 3, 4);
  for (double other : {uniform_at(2, 2, 3, 4), uniform_at(1, 3, 3, 4), uniform_at(1, 2, 4, 4),
                       uniform_at(1, 2, 3, 5), uniform_at(1, 2, 4, 3), uniform_at(2, 1, 3, 4),
                       uniform_at((1ull << 40) + 1, 2, 3, 4), uniform_at(1, (1ull << 40) + 2, 3, 4)})
    CHECK(other != u);
  // Pairs of neighbouring positions, samples and prompts fill a 10 x 10 grid evenly.
  for (int axis = 0; axis < 3; ++axis) {
    std::vector<double> cells(100);
    constexpr int kPairs = 20000;
    for (std::uint32_t i = 0; i < kPairs; ++i) {
      const double x = uniform_at(1, i, 0, 0);
      const double y = axis == 0   ? uniform_at(1, i, 0, 1)
                       : axis == 1 ? uniform_at(1, i, 1, 0)
                                   : uniform_at(1, i + 1, 0, 0);
      ++cells[static_cast<std::size_t>(x * 10) * 10 + static_cast<std::size_t>(y * 10)];
    }
    double statistic = 0;
    for (double count : cells) statistic += (count - kPairs / 100) * (count - kPairs / 100) / (kPairs / 100);
    INFO("axis " << axis);
    CHECK(statistic < chi_square_limit(99));
  }
}

TEST_CASE("bad rows are refused with a reason") {
  Sampler sampler;
  SamplingOptions greedy, filtered;
  greedy.temperature = 0;
  filtered.top_k = 2;
  const std::vector<float> nan = {0, std::nanf(""), 1}, impossible = {kMinusInfinity, kMinusInfinity};
  CHECK_THROWS_WITH(sampler.draw({}, {}, {}, 0.5), ContainsSubstring("an empty row of logits"));
  CHECK_THROWS_WITH(sampler.draw({}, {}, kLogits, 1.0),
                    ContainsSubstring("uniform draw is 1, expected [0, 1)"));
  CHECK_THROWS_WITH(sampler.draw({}, {}, kLogits, -0.1), ContainsSubstring("uniform draw is -0.1"));
  for (const SamplingOptions& options : {SamplingOptions{}, greedy, filtered}) {
    CHECK_THROWS_WITH(sampler.draw(options, {}, nan, 0.5), ContainsSubstring("NaN"));
    CHECK_THROWS_WITH(sampler.draw(options, {}, impossible, 0.5), ContainsSubstring("-inf"));
  }
  const std::vector<TokenId> outside = {12};
  SamplingHistory history{outside, outside, nullptr};
  filtered.repetition_penalty = 2;
  CHECK_THROWS_WITH(sampler.draw(filtered, history, kLogits, 0.5),
                    ContainsSubstring("token 12 outside a vocabulary of 12"));
}

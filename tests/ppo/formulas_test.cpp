// Formulas that no framework's vectors cover; numbers by hand.
#include "rlhf/ppo/gae.h"
#include "rlhf/ppo/value_loss.h"
#include "tests/catch.h"

using namespace rlhf::ppo;

namespace {

void check_equal(const std::vector<double>& actual, const std::vector<double>& expected) {
  REQUIRE(actual.size() == expected.size());
  for (std::size_t i = 0; i < expected.size(); ++i) {
    INFO("position " << i);
    CHECK(actual[i] == Approx(expected[i]).margin(1e-12));
  }
}

}  // namespace

TEST_CASE("GAE goes on from the value behind a truncated response") {
  GaeOptions options;
  options.gamma = 0.5;
  options.lambda = 1;
  const std::vector<std::size_t> offsets = {0, 2, 4};
  const std::vector<double> rewards = {0, 1, 0, 1}, values = {0.2, 0.4, 0.2, 0.4}, bootstrap = {2, 0};
  const auto gae = compute_gae(options, {{offsets, {}}, rewards, values, bootstrap});
  // First row: delta_1 = 1 + 0.5 * 2 - 0.4 = 1.6, delta_0 = 0.5 * 0.4 - 0.2 = 0, A_0 = 0.5 * 1.6.
  // Second: delta_1 = 1 - 0.4.
  check_equal(gae.advantages, {0.8, 1.6, 0.3, 0.6});
  check_equal(gae.returns, {1.0, 2.0, 0.5, 1.0});
}

TEST_CASE("the length-adaptive lambda is 1 - 1 / (alpha tokens), at least 0") {
  GaeOptions options;
  options.gamma = 1;
  options.length_adaptive_alpha = 0.5;
  options.mask = MaskHandling::kCarry;
  // 4 tokens (a fifth position does not count): 1 - 1/2; 2 tokens: 0; 1 token: below 0.
  const std::vector<std::size_t> offsets = {0, 5, 7, 8};
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1, 1, 1, 1};
  const std::vector<double> rewards = {0, 0, 0, 0, 1, 0, 1, 1}, values(8, 0.0);
  const auto gae = compute_gae(options, {{offsets, mask}, rewards, values, {}});
  check_equal(gae.advantages, {0.125, 0.25, 0.5, 0.5, 1, 0, 1, 1});
}

TEST_CASE("Huber value loss: the square near 0, linear beyond delta, and its gradient") {
  ValueLossOptions options;
  options.error = ValueError::kHuber;
  options.huber_delta = 1;
  options.clip_range = 0;
  const std::vector<std::size_t> offsets = {0, 3};
  const std::vector<double> values = {3, -0.5, -4}, returns = {0, 0, 0};
  const ValueLossResult result = value_loss(options, {{offsets, {}}, values, {}, returns, {}});
  // 1/2 mean of 2 * 3 - 1, 0.25, 2 * 4 - 1.
  CHECK(result.loss == Approx(0.5 * (5 + 0.25 + 7) / 3));
  check_equal(result.d_values, {1.0 / 3, -0.5 / 3, -1.0 / 3});
}

#include "rlhf/memory/bytes_predictor.h"

#include "rlhf/core/error.h"
#include "rlhf/core/random.h"
#include "tests/catch.h"

namespace rlhf {
namespace {

TEST_CASE("before anything is measured a prediction is the formula and a tenth") {
  const BytesPredictor predictor;
  CHECK(predictor.predict(1000) == 1100);
  CHECK(predictor.margin() == BytesPredictor::kFirstMargin);
}

TEST_CASE("an affine error is found and leaves the least margin") {
  BytesPredictor predictor;
  // Really 500 bytes and eleven tenths of the formula.
  const auto truth = [](std::uint64_t formula) { return 500 + formula * 11 / 10; };
  for (std::uint64_t formula = 10000; formula < 30000; formula += 2000)
    predictor.observe(formula, truth(formula));
  CHECK(predictor.margin() == BytesPredictor::kLeastMargin);
  CHECK(std::abs(static_cast<double>(predictor.predict(12345)) -
                 (1 + BytesPredictor::kLeastMargin) * static_cast<double>(truth(12345))) < 3);
  CHECK(predictor.predict(60000) >= 66000);  // twice what was ever seen: the formula and a tenth at least
  predictor.observe(20000, truth(20000));
  CHECK(std::abs(predictor.last_error()) < 1e-3);
  CHECK_THROWS_AS(predictor.observe(0, 1), InvalidArgument);
}

TEST_CASE("work that took less than the formula is not trusted to do so again") {
  BytesPredictor predictor;
  for (int i = 0; i < 20; ++i) predictor.observe(1000, 900);
  CHECK(predictor.predict(1000) == 1000);
  CHECK(predictor.predict(500) == 500);
}

TEST_CASE(
    "the margin covers what noise did, and a prediction is bounded while the formula is an upper bound") {
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    INFO("seed " << seed);
    RandomStream random(seed);
    BytesPredictor predictor;
    std::size_t too_small = 0;
    for (int i = 0; i < 200; ++i) {
      const std::uint64_t formula = 50000 + random.below(100000);
      const std::uint64_t measured = formula * (90 + random.below(8)) / 100;
      const std::uint64_t predicted = predictor.predict(formula);
      CHECK(predicted <= formula + formula / 10 + 1);
      too_small += predicted < measured;
      predictor.observe(formula, measured);
    }
    CHECK(too_small == 0);
    CHECK(predictor.margin() < 0.1);
  }
}

TEST_CASE("work beyond the formula lifts the bound") {
  BytesPredictor predictor;
  for (std::uint64_t i = 1; i <= 10; ++i) predictor.observe(1000 * i, 1500 * i);
  CHECK(predictor.predict(20000) >= 30000);
}

}  // namespace
}  // namespace rlhf

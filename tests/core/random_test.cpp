#include "rlhf/core/random.h"

#include <set>

#include "tests/catch.h"

using namespace rlhf;

// Known answers from the Random123 distribution (kat_vectors, philox4x32 with 10 rounds).
TEST_CASE("philox4x32 gives the published known answers") {
  CHECK(philox4x32({0, 0, 0, 0}, {0, 0}) ==
        std::array<std::uint32_t, 4>{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  CHECK(philox4x32({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, {0xffffffff, 0xffffffff}) ==
        std::array<std::uint32_t, 4>{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
}

TEST_CASE("draws depend on every coordinate and lie in the unit interval") {
  std::set<double> seen;
  for (std::uint64_t seed : {0, 1})
    for (std::uint64_t a : {0, 1})
      for (std::uint32_t b : {0, 1})
        for (std::uint32_t c : {0, 1}) {
          const double u = uniform_at(seed, a, b, c);
          CHECK((u >= 0 && u < 1));
          seen.insert(u);
        }
  CHECK(seen.size() == 16);
}

TEST_CASE("RandomStream has the moments of its distributions") {
  RandomStream stream(7);
  double mean = 0, square = 0, normal_square = 0;
  const int n = 20000;
  for (int i = 0; i < n; ++i) {
    const double u = stream.uniform();
    mean += u / n;
    square += u * u / n;
    const double z = stream.normal();
    normal_square += z * z / n;
  }
  CHECK(mean == Approx(0.5).margin(0.01));  // 5 standard errors = 0.0102
  CHECK(square == Approx(1.0 / 3).margin(0.011));
  CHECK(normal_square == Approx(1.0).margin(0.05));
}

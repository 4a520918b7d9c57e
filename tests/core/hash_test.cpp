#include "rlhf/core/hash.h"

#include <string_view>
#include <vector>

#include "tests/catch.h"

using namespace rlhf;

namespace {
std::uint64_t hash_of(std::string_view text, std::uint64_t seed = 0) {
  return hash_values(std::span<const char>(text.data(), text.size()), seed);
}
}  // namespace

// Values of the reference implementation (xxHash 0.8, XXH64).
TEST_CASE("XXH64 as the reference has it") {
  CHECK(hash_of("") == 0xef46db3751d8e999);
  CHECK(hash_of("a") == 0xd24ec4f1a98c6e5b);
  CHECK(hash_of("abc") == 0x44bc2cf5ad770999);
  CHECK(hash_of("Nobody inspects the spammish repetition") == 0xfbcea83c8a378bf1);
  CHECK(hash_text(hash_of("abc")) == "44bc2cf5ad770999");
  CHECK(hash_text(1) == "0000000000000001");
}

TEST_CASE("every bit, the length and the seed count") {
  std::vector<float> values(100);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i);
  const auto hash = [&] { return hash_values(std::span<const float>(values)); };
  const std::uint64_t before = hash();
  values[50] = -0.0f;
  const std::uint64_t negative = hash();
  values[50] = 0.0f;
  CHECK(negative != hash());
  values[50] = 50;
  CHECK(hash() == before);
  CHECK(hash_values(std::span<const float>(values).first(99)) != before);
  CHECK(hash_values(std::span<const float>(values), 1) != before);
}

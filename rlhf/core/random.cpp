#include "rlhf/core/random.h"

#include <cmath>
#include <numbers>

#include "rlhf/core/error.h"

namespace rlhf {

std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> counter,
                                        std::array<std::uint32_t, 2> key) {
  constexpr std::uint64_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
  constexpr std::uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = kMultiplier0 * counter[0];
    const std::uint64_t product1 = kMultiplier1 * counter[2];
    counter = {static_cast<std::uint32_t>(product1 >> 32) ^ counter[1] ^ key[0],
               static_cast<std::uint32_t>(product1),
               static_cast<std::uint32_t>(product0 >> 32) ^ counter[3] ^ key[1],
               static_cast<std::uint32_t>(product0)};
    key[0] += kWeyl0;
    key[1] += kWeyl1;
  }
  return counter;
}

namespace {

std::uint64_t bits_at(std::uint64_t seed, std::uint64_t a, std::uint32_t b, std::uint32_t c) {
  const auto words = philox4x32({static_cast<std::uint32_t>(a), static_cast<std::uint32_t>(a >> 32), b, c},
                                {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)});
  return (static_cast<std::uint64_t>(words[0]) << 32) | words[1];
}

double to_unit_interval(std::uint64_t bits) {
  return static_cast<double>(bits >> 11) * 0x1.0p-53;
}

}  // namespace

double uniform_at(std::uint64_t seed, std::uint64_t a, std::uint32_t b, std::uint32_t c) {
  return to_unit_interval(bits_at(seed, a, b, c));
}

std::uint64_t RandomStream::next_u64() {
  const std::uint64_t position = position_++;
  return bits_at(seed_, stream_, static_cast<std::uint32_t>(position),
                 static_cast<std::uint32_t>(position >> 32));
}

double RandomStream::uniform() {
  return to_unit_interval(next_u64());
}

std::uint64_t RandomStream::below(std::uint64_t bound) {
  RLHF_CHECK(bound > 0, "RandomStream::below: bound must be positive");
  const std::uint64_t limit = UINT64_MAX - UINT64_MAX % bound;
  std::uint64_t value = next_u64();
  while (value >= limit) value = next_u64();
  return value % bound;
}

double RandomStream::normal() {
  const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform()));
  return radius * std::cos(2.0 * std::numbers::pi * uniform());
}

}  // namespace rlhf

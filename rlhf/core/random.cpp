#include "rlhf/core/random.h"

#include <cmath>
#include <numbers>

#include "rlhf/core/error.h"
#include "rlhf/core/philox.h"

namespace rlhf {

std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> counter,
                                        std::array<std::uint32_t, 2> key) {
  const PhiloxWords words = philox_words({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
  return {words.word[0], words.word[1], words.word[2], words.word[3]};
}

double uniform_at(std::uint64_t seed, std::uint64_t a, std::uint32_t b, std::uint32_t c) {
  return to_unit_interval(random_bits_at(seed, a, b, c));
}

std::uint64_t RandomStream::next_u64() {
  const std::uint64_t position = position_++;
  return random_bits_at(seed_, stream_, static_cast<std::uint32_t>(position),
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

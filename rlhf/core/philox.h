#pragma once

#include <cstdint>

#include "rlhf/core/host_device.h"

namespace rlhf {

/// Four 32-bit words: a counter, or what Philox makes of one.
struct PhiloxWords {
  std::uint32_t word[4];
};

/// Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), for host and GPU.
RLHF_HOST_DEVICE inline PhiloxWords philox_words(PhiloxWords counter, std::uint32_t key0,
                                                 std::uint32_t key1) {
  constexpr std::uint64_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = kMultiplier0 * counter.word[0];
    const std::uint64_t product1 = kMultiplier1 * counter.word[2];
    counter = {{static_cast<std::uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0,
                static_cast<std::uint32_t>(product1),
                static_cast<std::uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1,
                static_cast<std::uint32_t>(product0)}};
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return counter;
}

/// 64 random bits, a pure function of (seed, a, b, c).
RLHF_HOST_DEVICE inline std::uint64_t random_bits_at(std::uint64_t seed, std::uint64_t a, std::uint32_t b,
                                                     std::uint32_t c) {
  const PhiloxWords words =
      philox_words({{static_cast<std::uint32_t>(a), static_cast<std::uint32_t>(a >> 32), b, c}},
                   static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32));
  return (static_cast<std::uint64_t>(words.word[0]) << 32) | words.word[1];
}

/// The 53 upper bits as a double in [0, 1).
RLHF_HOST_DEVICE inline double to_unit_interval(std::uint64_t bits) {
  return static_cast<double>(bits >> 11) * 0x1.0p-53;
}

}  // namespace rlhf

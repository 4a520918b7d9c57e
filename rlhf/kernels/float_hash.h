#pragma once

#include <bit>
#include <cstdint>
#include <span>

#include "rlhf/kernels/layout.h"

namespace rlhf::kernels {

/// What element `i` with these bits adds, modulo 2^64, to the hash of a row of floats: the finaliser of
/// SplitMix64 (Steele, Lea and Flood 2014) of place and bits. A sum, so that parts are hashed in any order,
/// on any device and by several ranks. For telling contents apart, not against forgery.
RLHF_HOST_DEVICE constexpr std::uint64_t float_hash_term(std::uint64_t i, std::uint32_t bits) {
  std::uint64_t z = (i + 1) * 0x9E3779B97F4A7C15U + bits;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9U;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBU;
  return z ^ (z >> 31);
}

/// Of floats number `first`, first + 1, ...
inline std::uint64_t hash_floats(std::span<const float> values, std::uint64_t first = 0) {
  std::uint64_t sum = 0;
  for (const float value : values) sum += float_hash_term(first++, std::bit_cast<std::uint32_t>(value));
  return sum;
}

}  // namespace rlhf::kernels

#pragma once

#include <array>
#include <cstdint>

namespace rlhf {

/// Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): maps a 128-bit
/// counter and a 64-bit key to 128 random bits. Stateless, so a draw depends on nothing but its coordinates.
std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> counter,
                                        std::array<std::uint32_t, 2> key);

/// Uniform double in [0, 1) with 53 bits, a pure function of (seed, a, b, c).
double uniform_at(std::uint64_t seed, std::uint64_t a, std::uint32_t b, std::uint32_t c);

/// A sequence of draws from one stream of a seed. Copyable; equal (seed, stream) give equal sequences on
/// every machine. Used for shuffles, data generators and initial weights; token draws use uniform_at.
class RandomStream {
 public:
  explicit RandomStream(std::uint64_t seed, std::uint64_t stream = 0) : seed_(seed), stream_(stream) {}

  std::uint64_t next_u64();
  /// Uniform in [0, 1).
  double uniform();
  /// Uniform integer in [0, bound); `bound` must be positive. Unbiased.
  std::uint64_t below(std::uint64_t bound);
  /// Standard normal (Box-Muller; one value per call).
  double normal();

 private:
  std::uint64_t seed_;
  std::uint64_t stream_;
  std::uint64_t position_ = 0;
};

}  // namespace rlhf

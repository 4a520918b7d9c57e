#pragma once
// What the ranks of the test program put into a collective.

#include <cstdint>
#include <string>
#include <vector>

namespace rlhf {

/// Values whose sums depend on the order in which they are added: magnitudes from 1e-4 to 1e4.
template <class T>
std::vector<T> values_of(int rank, std::size_t count) {
  std::vector<T> values(count);
  std::uint64_t state = 0x9e3779b97f4a7c15u * static_cast<std::uint64_t>(rank + 1) + count;
  for (T& value : values) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const double unit = static_cast<double>(state >> 11) / 9007199254740992.0 - 0.5;
    constexpr double kScales[] = {1e-4, 1, 37.5, 1e4};
    value = static_cast<T>(unit * kScales[(state >> 7) % 4]);
  }
  return values;
}

/// Elements of two bytes.
inline std::vector<std::uint16_t> halves_of(int rank, std::size_t count) {
  std::vector<std::uint16_t> values(count);
  for (std::size_t i = 0; i < count; ++i)
    values[i] = static_cast<std::uint16_t>(i * 7919 + static_cast<std::size_t>(rank) * 131);
  return values;
}

/// No element, fewer than ranks, an odd count, one above the bound for small messages, several chunks.
inline const std::vector<std::size_t> kCounts = {0, 1, 3, 1000, 5001, 1200003};

/// Beginning of a rank's slice, by the rule in the interface: a multiple of 64 elements to everybody where
/// there are that many, and the rest to the last.
inline std::size_t begin_of(std::size_t count, int rank, int ranks) {
  const std::size_t even = count / static_cast<std::size_t>(ranks);
  if (rank == ranks) return count;
  return static_cast<std::size_t>(rank) * (even < 64 ? even : even / 64 * 64);
}

/// Elements of a device's array that are divided unevenly, at most: several pieces.
inline constexpr std::size_t kUnevenCount = 20000;

/// Beginning of a rank's part of an array that is divided unevenly: the first rank has least, few elements
/// leave ranks without any.
inline std::size_t uneven_begin_of(std::size_t count, int rank, int ranks) {
  const auto r = static_cast<std::size_t>(rank), n = static_cast<std::size_t>(ranks);
  return count * r * r / (n * n);
}

inline std::string text_of(int rank) {
  return std::string(static_cast<std::size_t>(rank) * 3000, static_cast<char>('a' + rank));
}

}  // namespace rlhf

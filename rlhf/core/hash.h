#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <type_traits>

namespace rlhf {

/// XXH64 of some bytes (Collet, xxHash specification, version 0.1.1): several GB/s, for telling contents
/// apart, not against forgery. A value as the seed of the next call chains them.
std::uint64_t hash_bytes(std::span<const std::byte> bytes, std::uint64_t seed = 0);

/// The same of the values' bytes. T has no padding.
template <class T>
std::uint64_t hash_values(std::span<const T> values, std::uint64_t seed = 0) {
  static_assert(std::has_unique_object_representations_v<T> || std::is_floating_point_v<T>);
  return hash_bytes(std::as_bytes(values), seed);
}

/// 16 hexadecimal digits.
std::string hash_text(std::uint64_t hash);

}  // namespace rlhf

#pragma once

#include <cstdint>

namespace rlhf {

// Bounds that no published model reaches: a hostile file must not make us reserve memory or overflow a
// product.
inline constexpr std::int64_t kMaxVocabulary = 1 << 24;
inline constexpr std::int64_t kMaxWidth = 1 << 20;
inline constexpr std::int64_t kMaxLayers = 1 << 12;
inline constexpr std::int64_t kMaxHeads = 1 << 12;
inline constexpr std::int64_t kMaxPositions = std::int64_t{1} << 31;

}  // namespace rlhf

#pragma once
// Where elements lie in the buffers that kernels share. One place, for host and GPU, and 64 bits wide: a
// cache of some GiB has more than 2^31 elements.

#include <cstdint>

#include "rlhf/core/host_device.h"
#include "rlhf/kernels/float8.h"

namespace rlhf::kernels {

/// Keys per K/V block. K is stored [G][H][kBlockTokens] (keys along vector lanes), V is [G][kBlockTokens][H].
inline constexpr std::int64_t kBlockTokens = 16;

/// Rows of kBlockTokens elements that a head of a block has more than H: in Float8 one, with the scale of
/// every slot (a Float8Scale). So what a block holds is contiguous in any element E.
template <class E>
inline constexpr std::int64_t kScaleRows = 0;
template <>
inline constexpr std::int64_t kScaleRows<Float8> = 1;

/// First element of kv head g in a block, of K and of V.
template <class E = void>
RLHF_HOST_DEVICE constexpr std::int64_t head_offset(std::int64_t block, std::int64_t block_stride,
                                                    std::int64_t g, std::int64_t H) {
  return block * block_stride + g * (H + kScaleRows<E>)*kBlockTokens;
}
/// Elements of K, or V, of one block and layer.
template <class E = void>
RLHF_HOST_DEVICE constexpr std::int64_t block_elements(std::int64_t G, std::int64_t H) {
  return head_offset<E>(0, 0, G, H);
}
/// The scale of a slot, from the head's offset.
RLHF_HOST_DEVICE constexpr std::int64_t scale_offset(std::int64_t slot, std::int64_t H) {
  return H * kBlockTokens + slot;
}
/// Element h of the key in `slot`, from the head's offset.
RLHF_HOST_DEVICE constexpr std::int64_t key_offset(std::int64_t slot, std::int64_t h) {
  return h * kBlockTokens + slot;
}
/// Element h of the value in `slot`, from the head's offset.
RLHF_HOST_DEVICE constexpr std::int64_t value_offset(std::int64_t slot, std::int64_t h, std::int64_t H) {
  return slot * H + h;
}
/// Element (row, column) of a row-major matrix.
RLHF_HOST_DEVICE constexpr std::int64_t matrix_offset(std::int64_t row, std::int64_t column,
                                                      std::int64_t stride) {
  return row * stride + column;
}
RLHF_HOST_DEVICE constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}
/// First key that a query at `position` sees in a layer with a sliding window; 0 = no window.
RLHF_HOST_DEVICE constexpr std::int64_t first_visible_key(std::int64_t position, std::int64_t window) {
  return window > 0 && position + 1 > window ? position + 1 - window : 0;
}

/// Attention over a long context is cut into parts of so many keys, counted from key 0, whatever the batch:
/// the order of summation of a row depends on its own keys only.
inline constexpr std::int64_t kKeysPerPart = 256;
struct PartRange {
  std::int64_t first, count;  ///< parts that hold a visible key
};
RLHF_HOST_DEVICE constexpr PartRange visible_parts(std::int64_t first_key, std::int64_t num_keys) {
  const std::int64_t first = first_key / kKeysPerPart;
  return {first, ceil_div(num_keys, kKeysPerPart) - first};
}
/// Most parts that any row of a pass has whose longest row sees max_keys keys.
RLHF_HOST_DEVICE constexpr std::int64_t max_attention_parts(std::int64_t max_keys, std::int64_t window) {
  const std::int64_t all = ceil_div(max_keys, kKeysPerPart);
  const std::int64_t in_window = window > 0 ? window / kKeysPerPart + 2 : all;
  return in_window < all ? in_window : all;
}
/// Partial results of one (row, head, part): H sums, then the maximum and the total.
RLHF_HOST_DEVICE constexpr std::int64_t part_offset(std::int64_t row, std::int64_t n, std::int64_t part,
                                                    std::int64_t N, std::int64_t parts, std::int64_t H) {
  return ((row * N + n) * parts + part) * (H + 2);
}

/// Most rows of a tile of PassRows. Runs of fewer rows than kMinTileRows are not worth a tile.
inline constexpr std::int64_t kTileRows = 64, kMinTileRows = 16;
/// Neighbouring K/V blocks whose gradients a GPU computes together.
inline constexpr std::int64_t kBlocksPerGroup = 4;
/// Widths of a head that attention in bfloat16 has tensor-core kernels for: they take the rows in tiles.
constexpr bool takes_tiles(std::int64_t H) {
  return H == 32 || H == 64 || H == 96 || H == 128;
}

}  // namespace rlhf::kernels

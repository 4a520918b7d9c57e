#pragma once
// K and V in Float8 on the CPU: what defines them, and what the GPU's kernels are compared with. Blocks are
// widened for every row anew.

#include <algorithm>
#include <bit>
#include <cstdint>
#include <numeric>
#include <type_traits>
#include <vector>

#include "rlhf/kernels/device_kernels.h"
#include "rlhf/kernels/ops.h"

namespace rlhf::kernels {

/// Writes the H elements of x to a slot of a head's block; in Float8 with their scale.
/// @param offset place of element h, from the head's first
template <class T, class E, class Offset>
void store_in_slot(E* head, std::int64_t slot, std::int64_t H, const T* x, const Offset& offset) {
  if constexpr (std::is_same_v<T, E>) {
    for (std::int64_t h = 0; h < H; ++h) head[offset(h)] = x[h];
  } else {
    std::uint32_t largest = 0;
    for (std::int64_t h = 0; h < H; ++h)
      largest = std::max(largest, std::bit_cast<std::uint32_t>(static_cast<float>(x[h])) & 0x7FFFFFFFU);
    const Float8Scale scale = float8_scale(largest);
    for (std::int64_t h = 0; h < H; ++h)
      head[offset(h)] = from_float<Float8>(static_cast<float>(x[h]) * inverse_scale(scale));
    head[scale_offset(slot, H)] = {scale.bits};
  }
}

/// One kv head of the blocks that a row sees, in T: K and V as layout.h has them, block after block.
template <class T>
struct WidenedHead {
  std::vector<T> k, v;
  std::vector<std::int32_t> table;

  void widen(const AttentionArgs<T, Float8>& cache, const std::int32_t* blocks, std::int64_t first_key,
             std::int64_t num_keys, std::int64_t g) {
    const std::int64_t H = cache.H, size = H * kBlockTokens, count = ceil_div(num_keys, kBlockTokens);
    k.resize(static_cast<std::size_t>(count * size));
    v.resize(k.size());
    table.resize(static_cast<std::size_t>(count));
    std::iota(table.begin(), table.end(), 0);
    for (std::int64_t b = first_key / kBlockTokens; b < count; ++b) {
      const std::int64_t at = head_offset<Float8>(blocks[b], cache.block_stride, g, H);
      for (std::int64_t slot = 0; slot < kBlockTokens; ++slot)
        for (std::int64_t h = 0; h < H; ++h) {
          const auto read = [&](const Float8* head, std::int64_t offset) {
            return static_cast<T>(to_float(head[offset]) * scale_value({head[scale_offset(slot, H)].bits}));
          };
          k[static_cast<std::size_t>(b * size + key_offset(slot, h))] =
              read(cache.k + at, key_offset(slot, h));
          v[static_cast<std::size_t>(b * size + value_offset(slot, h, H))] =
              read(cache.v + at, value_offset(slot, h, H));
        }
    }
  }
};

template <class T>
void attention_fp8(const Compute<T>& compute, const PassAttentionArgs<T, Float8>& args,
                   const PassRows& rows) {
  const std::int64_t N = args.cache.N, G = args.cache.G, H = args.cache.H, group = N / G;
  compute.for_rows(rows.count * G, 4 * group * H * rows.max_keys, [&](std::int64_t task) {
    static thread_local WidenedHead<T> head;
    const std::int64_t t = task / G, g = task % G, n = g * group, position = rows.positions[t];
    const std::int64_t first = first_visible_key(position, args.window);
    head.widen(args.cache, rows.tables[t], first, position + 1, g);
    const AttentionRow<T> row = {args.q + t * args.q_stride + n * H,
                                 args.out + (t * N + n) * H,
                                 args.lse ? args.lse + t * N + n : nullptr,
                                 head.table.data(),
                                 first,
                                 position + 1};
    compute.table().attention(
        {head.k.data(), head.v.data(), H * kBlockTokens, group, 1, H, args.cache.scale, args.cache.softcap},
        &row, 1, 0);
  });
}

}  // namespace rlhf::kernels

#pragma once
// Tiles of keys out of a cache in Float8, for attention_tiles.cuh: codes are copied to shared memory one tile
// ahead, as they lie, and become the tile in bfloat16 when the one before has been used. Codes times scales
// are bfloat16 numbers, so nothing is rounded there: a row has the bits that it has over a cache in bfloat16
// with these numbers. Widening costs some 5 instructions an element, for up to 64 rows.

#include "rlhf/kernels/cuda/attention_tiles.cuh"
#include "rlhf/kernels/cuda/wide.cuh"

namespace rlhf::kernels::RLHF_GPU {

/// The codes of a tile in shared memory: K of its blocks, each with its row of scales, then V.
template <int kWidth>
struct CodeTile {
  static constexpr int kBlocks = KeyTile<kWidth>::kBlocks, kRows = kWidth + 1;  // of 16 codes, in a block
  static constexpr int kBlockBytes = kRows * kBlockKeys, kV = kBlocks * kBlockBytes, kBytes = 2 * kV;
};
template <int kWidth>
constexpr std::size_t kTileBytes<kWidth, Float8> =
    KeyTile<kWidth>::kElements * sizeof(Bfloat16) + CodeTile<kWidth>::kBytes;

/// True where block `block` of the tile from key `first` on holds a key that some row sees.
__device__ inline bool sees_block(const QueryTile& tile, int first, int block) {
  const int key = first + block * kBlockKeys;
  return key < tile.num_keys && key + kBlockKeys > tile.first_key;
}

/// Starts to copy the blocks of keys [first, first + kKeys) that are seen.
template <int kWidth>
__device__ inline void load_codes(unsigned char* to, const AttentionArgs<Bfloat16, Float8>& cache,
                                  const QueryTile& tile, int first) {
  using Codes = CodeTile<kWidth>;
  for (int i = static_cast<int>(threadIdx.x); i < Codes::kBlocks * Codes::kRows; i += kTileThreads) {
    const int block = i / Codes::kRows, row = i % Codes::kRows;
    if (!sees_block(tile, first, block)) continue;
    const std::int64_t from =
        head_offset<Float8>(tile.table[first / kBlockKeys + block], cache.block_stride, tile.g, kWidth) +
        row * kBlockKeys;
    copy_later<16>(to + i * kBlockKeys, cache.k + from, true);
    copy_later<16>(to + Codes::kV + i * kBlockKeys, cache.v + from, true);
  }
}

/// 16 codes times scale(i), as 16 elements in two places.
template <class Scale>
__device__ inline void widen_codes(Bfloat16* low, Bfloat16* high, const unsigned char* codes,
                                   const Scale& scale) {
  const Words words = load_words(codes);
  Words wide[2];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const auto value = [&](int j) { return element<Float8>(words, j) * 0x1p120F * scale(j); };
    wide[i / 4].at[i % 4] = round_pair(value(2 * i), value(2 * i + 1));
  }
  store_words(low, wide[0]);
  store_words(high, wide[1]);
}

/// From codes to the tile that load_keys makes. Values of slots that no row sees become zeros.
template <int kWidth>
__device__ inline void widen_keys(Bfloat16* to, const unsigned char* codes, const QueryTile& tile,
                                  int first) {
  using Tile = KeyTile<kWidth>;
  using Codes = CodeTile<kWidth>;
  constexpr int kPieces = kWidth / kBlockKeys;  // of 16 elements, in a value
  for (int i = static_cast<int>(threadIdx.x); i < Codes::kBlocks * kWidth; i += kTileThreads) {
    const int block = i / kWidth, row = i % kWidth, slot = row / kPieces;
    const unsigned char* k = codes + block * Codes::kBlockBytes;
    const unsigned char* v = k + Codes::kV;
    const bool seen = sees_block(tile, first, block);
    Bfloat16* const keys = to + block * Tile::kBlockElements;
    const auto key_scale = [&](int j) { return scale_value({k[scale_offset(j, kWidth)]}); };
    if (seen)
      widen_codes(keys + KeyMajor::chunk(2 * row), keys + KeyMajor::chunk(2 * row + 1), k + row * kBlockKeys,
                  key_scale);
    Bfloat16* const value =
        to + Tile::kV + (block * kBlockKeys + slot) * Padded<kWidth>::kStride + row % kPieces * kBlockKeys;
    if (seen && first + block * kBlockKeys + slot < tile.num_keys) {
      const float scale = scale_value({v[scale_offset(slot, kWidth)]});
      widen_codes(value, value + 8, v + row * kBlockKeys, [&](int) { return scale; });
    } else {
      store_words(value, {});
      store_words(value + 8, {});
    }
  }
}

template <int kWidth, class Fn>
__device__ inline void for_key_tiles(const AttentionArgs<Bfloat16, Float8>& cache, const QueryTile& tile,
                                     const Fn& fn) {
  using Tile = KeyTile<kWidth>;
  Bfloat16* keys = block_shared<Bfloat16>();
  unsigned char* codes = reinterpret_cast<unsigned char*>(keys + Tile::kElements);
  const int begin = tile.first_key / Tile::kKeys * Tile::kKeys;
  load_codes<kWidth>(codes, cache, tile, begin);
  for (int first = begin; first < tile.num_keys; first += Tile::kKeys) {
    wait_for_copies();
    __syncthreads();  // the codes are there, and every warp has left the tile
    widen_keys<kWidth>(keys, codes, tile, first);
    __syncthreads();  // the tile is there, and its codes are not needed any more
    if (first + Tile::kKeys < tile.num_keys) load_codes<kWidth>(codes, cache, tile, first + Tile::kKeys);
    fn(keys, first);
  }
}

}  // namespace rlhf::kernels::RLHF_GPU

#pragma once
// Attention of tiles of rows on tensor cores, in bf16 (FlashAttention-2, Dao 2023). Grid: (tile, query head).
// Each of the four warps has 16 rows and their q in registers and goes through tiles of keys, which the block
// copies to shared memory one ahead; scores and weights stay in registers. Which keys are a tile depends on
// the key alone, and a tile that a row does not see changes no bit of it: a row's result is the same in any
// tile of rows. Weights are rounded to bf16 for the product with V, their total is not.

#include <cmath>
#include <type_traits>

#include "rlhf/kernels/cuda/mma.cuh"
#include "rlhf/kernels/cuda/reduce.cuh"
#include "rlhf/kernels/device_kernels.h"

namespace rlhf::kernels::RLHF_GPU {

constexpr int kMmaRows = 16, kTileWarps = 4, kTileThreads = kTileWarps * kWarp;
constexpr int kBlockKeys = static_cast<int>(kBlockTokens);
static_assert(kTileRows == kTileWarps * kMmaRows && kBlockTokens == 16);
constexpr float kLog2e = 1.4426950408889634F, kLn2 = 0.6931471805599453F;

/// Operands in shared memory are pieces of 16 rows x 16 elements. load_matrices takes their quarters either
/// rows first (down, then right) or not: A from [row][k], and B from [k][column] transposed, want rows first;
/// A from [k][row] transposed, and B from [column][k], do not.
struct PieceLane {
  int row, half;
};
template <bool kRowsFirst>
__device__ inline PieceLane piece_lane() {
  const int low = lane_id() % 8, second = lane_id() / 8 % 2, third = lane_id() / 16;
  return kRowsFirst ? PieceLane{low + 8 * second, third} : PieceLane{low + 8 * third, second};
}

/// Rows of kWidth elements in shared memory, 16 bytes apart from one another so that eight of them lie in
/// different banks.
template <int kWidth>
struct Padded {
  static constexpr int kStride = kWidth + 8, kPiece = kMmaRows * kStride;
  /// The lane's place in a piece.
  template <bool kRowsFirst>
  static __device__ int lane() {
    const PieceLane lane = piece_lane<kRowsFirst>();
    return lane.row * kStride + lane.half * 8;
  }
};

/// A block of K as it lies in memory, [kWidth][16]. Which half of a row comes first changes every four rows,
/// so that eight rows lie in different banks.
struct KeyMajor {
  static constexpr int kPiece = 16 * kBlockKeys;
  /// Place of 16-byte chunk `chunk` of a block.
  static __device__ int chunk(int chunk) { return (chunk ^ (chunk / 8 % 2)) * 8; }
  template <bool kRowsFirst>
  static __device__ int lane() {
    const PieceLane lane = piece_lane<kRowsFirst>();
    return chunk(2 * lane.row + lane.half);
  }
};

/// A tile of keys in shared memory: K in blocks, then V.
template <int kWidth>
struct KeyTile {
  static constexpr int kKeys = kWidth <= 64 ? 64 : 32, kBlocks = kKeys / kBlockKeys;
  static constexpr int kBlockElements = kWidth * kBlockKeys;
  static constexpr int kV = kKeys * kWidth, kElements = kV + kKeys * Padded<kWidth>::kStride;
  static constexpr std::size_t kBytes = 2 * kElements * sizeof(Bfloat16);  // one is loaded while one is used
};
/// Shared memory of a block that goes through tiles of keys out of a cache of E.
template <int kWidth, class E>
constexpr std::size_t kTileBytes = KeyTile<kWidth>::kBytes;

/// Up to 64 rows and one query head. Ints: registers are scarce.
struct QueryTile {
  const std::int32_t* table;
  int first_row, n, g, rows, position;  ///< position of the first row
  int first_key, num_keys;              ///< that some row sees
};

/// Blocks take the last tiles first: those of the end of a sequence, which have most to do.
template <class T, class E>
__device__ inline QueryTile query_tile(const AttentionArgs<T, E>& cache, const PassRows& rows,
                                       std::int64_t window) {
  const int N = static_cast<int>(cache.N), block = static_cast<int>(blockIdx.x), n = block % N;
  const std::int64_t i = rows.num_tiles - 1 - block / N;
  const int first = rows.tiles[2 * i], count = rows.tiles[2 * i + 1], position = rows.positions[first];
  return {rows.tables[first],
          first,
          n,
          n / static_cast<int>(cache.N / cache.G),
          count,
          position,
          static_cast<int>(first_visible_key(position, window)),
          position + count};
}

/// Starts to copy keys [first, first + kKeys). Blocks that hold none of [begin, end), and values from `end`
/// on, become zeros: their slots may hold anything.
template <int kWidth>
__device__ inline void load_keys(Bfloat16* to, const AttentionArgs<Bfloat16>& cache, const QueryTile& tile,
                                 int first) {
  using Tile = KeyTile<kWidth>;
  constexpr int kChunks = 2 * kWidth, kAll = Tile::kBlocks * kChunks, kValueChunks = kWidth / 8;
  static_assert(kAll % kTileThreads == 0);
#pragma unroll
  for (int j = 0; j < kAll / kTileThreads; ++j) {
    const int i = static_cast<int>(threadIdx.x) + j * kTileThreads;
    const int in_tile = i / kChunks, chunk = i % kChunks, slot = chunk / kValueChunks;
    const int key = first + in_tile * kBlockKeys;
    const bool seen = key < tile.num_keys && key + kBlockKeys > tile.first_key;
    const std::int64_t block = seen ? tile.table[key / kBlockKeys] : 0;
    const std::int64_t from = head_offset(block, cache.block_stride, tile.g, kWidth) + 8 * chunk;
    copy_later<16>(to + in_tile * Tile::kBlockElements + KeyMajor::chunk(chunk), cache.k + from, seen);
    copy_later<16>(
        to + Tile::kV + (in_tile * kBlockKeys + slot) * Padded<kWidth>::kStride + 8 * (chunk % kValueChunks),
        cache.v + from, seen && key + slot < tile.num_keys);
  }
}

/// A of 16 rows of x, zeros from row `rows` on.
template <int kWidth>
__device__ inline void load_rows(unsigned (&a)[kWidth / 16][4], const Bfloat16* x, std::int64_t stride,
                                 int rows) {
  const int row = lane_id() / 4, pair = 2 * (lane_id() % 4);
#pragma unroll
  for (int k = 0; k < kWidth / 16; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = row + i % 2 * 8, h = 16 * k + pair + i / 2 * 8;
      a[k][i] = r < rows ? load_pair(x + r * stride + h) : 0;
    }
}

/// What a warp's 16 rows see of keys.
struct RowsOfWarp {
  int first_position, window;  ///< window 0 = all

  __device__ int first_key(int position) const {
    return window > 0 && position >= window ? position + 1 - window : 0;
  }
  /// Some row sees one of `count` keys from `key` on.
  __device__ bool see_any(int key, int count) const {
    return key < first_position + kMmaRows && key + count > first_key(first_position);
  }
  __device__ bool see_all(int key, int count) const {
    return key + count <= first_position + 1 && key >= first_key(first_position + kMmaRows - 1);
  }
  __device__ bool sees(int row, int key) const {
    const int position = first_position + row;
    return key <= position && key >= first_key(position);
  }
};

/// Row and column of element e of the lane's part of D number j.
__device__ inline int fragment_row(int e) {
  return lane_id() / 4 + e / 2 * 8;
}
__device__ inline int fragment_column(int j, int e) {
  return 8 * j + 2 * (lane_id() % 4) + e % 2;
}

/// Over the four lanes that hold a row of D.
__device__ inline float row_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, 1));
  return fmaxf(value, __shfl_xor_sync(kAllLanes, value, 2));
}
__device__ inline float row_sum(float value) {
  value += __shfl_xor_sync(kAllLanes, value, 1);
  return value + __shfl_xor_sync(kAllLanes, value, 2);
}

/// The A whose columns are those of D number 2 k and 2 k + 1.
template <int kCount>
__device__ inline void pack_rows(unsigned (&a)[4], const float (&d)[kCount][4], int k) {
  a[0] = round_pair(d[2 * k][0], d[2 * k][1]);
  a[1] = round_pair(d[2 * k][2], d[2 * k][3]);
  a[2] = round_pair(d[2 * k + 1][0], d[2 * k + 1][1]);
  a[3] = round_pair(d[2 * k + 1][2], d[2 * k + 1][3]);
}

/// d[., 16 i ..] += a B, pieces of B a fixed distance apart.
template <bool kTransposed, int kCount>
__device__ inline void multiply_add_row(float (&d)[kCount][4], const unsigned (&a)[4], const Bfloat16* b,
                                        int distance) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    unsigned m[4];
    load_matrices<kTransposed>(m, b + i * distance);
    multiply_add(d[2 * i], a, m[0], m[1]);
    multiply_add(d[2 * i + 1], a, m[2], m[3]);
  }
}

/// Softmax state of the lane's two rows, `factor` times the scores being exponents of 2.
template <int kWidth>
struct RowSoftmax {
  float maximum[2], total[2], sum[kWidth / 8][4];
};

/// Scores to weights; what was summed before is scaled to the new maxima.
template <int kWidth, int kCount>
__device__ inline void weigh(RowSoftmax<kWidth>& state, float (&s)[kCount][4], float factor) {
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    float maximum = state.maximum[side];
#pragma unroll
    for (int j = 0; j < kCount; ++j) maximum = fmaxf(maximum, fmaxf(s[j][2 * side], s[j][2 * side + 1]));
    maximum = row_max(maximum);
    const float correction = power_of_two((state.maximum[side] - maximum) * factor);
    const float shift = maximum * factor;
    float total = 0;
#pragma unroll
    for (int j = 0; j < kCount; ++j)
#pragma unroll
      for (int e = 2 * side; e < 2 * side + 2; ++e) {
        s[j][e] = power_of_two(s[j][e] * factor - shift);
        total += s[j][e];
      }
    state.maximum[side] = maximum;
    state.total[side] = state.total[side] * correction + total;
#pragma unroll
    for (int j = 0; j < kWidth / 8; ++j)
#pragma unroll
      for (int e = 2 * side; e < 2 * side + 2; ++e) state.sum[j][e] *= correction;
  }
}

template <int kWidth>
__device__ inline void add_keys(RowSoftmax<kWidth>& state, const unsigned (&q)[kWidth / 16][4],
                                const Bfloat16* keys, const RowsOfWarp& rows, int first, float score_scale,
                                float softcap, float factor) {
  using Tile = KeyTile<kWidth>;
  float s[Tile::kKeys / 8][4] = {};
  const Bfloat16* k = keys + KeyMajor::lane<true>();
#pragma unroll
  for (int i = 0; i < kWidth / 16; ++i)
    multiply_add_row<true>(s, q[i], k + i * KeyMajor::kPiece, Tile::kBlockElements);
  if (softcap > 0) {
#pragma unroll
    for (auto& d : s)
#pragma unroll
      for (float& score : d) score = softcap * tanhf(score * score_scale / softcap);
  }
  if (!rows.see_all(first, Tile::kKeys)) {
#pragma unroll
    for (int j = 0; j < Tile::kKeys / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (!rows.sees(fragment_row(e), first + fragment_column(j, e))) s[j][e] = -INFINITY;
  }
  weigh(state, s, factor);
  const Bfloat16* v = keys + Tile::kV + Padded<kWidth>::template lane<true>();
#pragma unroll
  for (int i = 0; i < Tile::kBlocks; ++i) {
    unsigned p[4];
    pack_rows(p, s, i);
    multiply_add_row<true>(state.sum, p, v + i * Padded<kWidth>::kPiece, 16);
  }
}

template <int kWidth, class E>
__device__ inline void store_rows(const PassAttentionArgs<Bfloat16, E>& args, const RowSoftmax<kWidth>& state,
                                  std::int64_t first_row, std::int64_t n, int rows, float factor) {
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const int row = fragment_row(2 * side);
    const float total = row_sum(state.total[side]), inverse = 1 / total;
    if (row >= rows) continue;
    const std::int64_t head = (first_row + row) * args.cache.N + n;
#pragma unroll
    for (int j = 0; j < kWidth / 8; ++j)
      store_pair(args.out + matrix_offset(head, fragment_column(j, 0), kWidth),
                 round_pair(state.sum[j][2 * side] * inverse, state.sum[j][2 * side + 1] * inverse));
    if (args.lse && lane_id() % 4 == 0) args.lse[head] = state.maximum[side] * factor * kLn2 + logf(total);
  }
}

/// Calls fn(tile in shared memory, its first key) for the tiles of keys that some row sees, in order; every
/// warp of the block comes along.
template <int kWidth, class Fn>
__device__ inline void for_key_tiles(const AttentionArgs<Bfloat16>& cache, const QueryTile& tile,
                                     const Fn& fn) {
  using Tile = KeyTile<kWidth>;
  Bfloat16* keys = block_shared<Bfloat16>();  // two tiles
  const int begin = tile.first_key / Tile::kKeys * Tile::kKeys;
  int place = 0;
  for (int first = begin - Tile::kKeys; first < tile.num_keys; first += Tile::kKeys) {
    wait_for_copies();
    __syncthreads();  // the tile is there, and every warp has left the one before
    if (first + Tile::kKeys < tile.num_keys)
      load_keys<kWidth>(keys + place * Tile::kElements, cache, tile, first + Tile::kKeys);
    place = 1 - place;
    if (first >= begin) fn(keys + place * Tile::kElements, first);
  }
}

template <int kWidth, class E>
__global__ void __launch_bounds__(kTileThreads, 3)
    attention_tile_kernel(PassAttentionArgs<Bfloat16, E> args, PassRows rows) {
  using Tile = KeyTile<kWidth>;
  const QueryTile tile = query_tile(args.cache, rows, args.window);
  const float scale = static_cast<float>(args.cache.scale), softcap = static_cast<float>(args.cache.softcap);
  const float factor = softcap > 0 ? kLog2e : scale * kLog2e;
  const int row = warp_id() * kMmaRows;
  const RowsOfWarp mine = {tile.position + row, static_cast<int>(args.window)};

  unsigned q[kWidth / 16][4];
  load_rows<kWidth>(q, args.q + matrix_offset(tile.first_row + row, tile.n * kWidth, args.q_stride),
                    args.q_stride, tile.rows - row);
  RowSoftmax<kWidth> state;
  for (int side = 0; side < 2; ++side) {
    state.maximum[side] = -1e30F;  // finite: keys that a row does not see must weigh 0, not NaN
    state.total[side] = 0;
  }
#pragma unroll
  for (auto& d : state.sum)
#pragma unroll
    for (float& sum : d) sum = 0;

  for_key_tiles<kWidth>(args.cache, tile, [&](const Bfloat16* keys, int first) {
    if (row < tile.rows && mine.see_any(first, Tile::kKeys))
      add_keys<kWidth>(state, q, keys, mine, first, scale, softcap, factor);
  });
  if (row < tile.rows) store_rows<kWidth>(args, state, tile.first_row + row, tile.n, tile.rows - row, factor);
}

inline bool aligned(const void* pointer, std::size_t bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

/// True for the heads that have kernels on tensor cores, where rows of the cache lie as their copies need it.
template <class T, class E>
bool tensor_cores_take(const AttentionArgs<T, E>& cache) {
  return sizeof(T) == sizeof(Bfloat16) && takes_tiles(cache.H) &&
         cache.block_stride * static_cast<std::int64_t>(sizeof(E)) % 16 == 0 && aligned(cache.k, 16) &&
         aligned(cache.v, 16);
}

/// Calls fn with the width of a head as a constant.
template <class Fn>
void with_head_width(std::int64_t H, const Fn& fn) {
  if (H == 32) fn(std::integral_constant<int, 32>());
  if (H == 64) fn(std::integral_constant<int, 64>());
  if (H == 96) fn(std::integral_constant<int, 96>());
  if (H == 128) fn(std::integral_constant<int, 128>());
}

template <class E>
void launch_attention_tiles(const PassAttentionArgs<Bfloat16, E>& args, const PassRows& rows, void* queue) {
  with_head_width(args.cache.H, [&](auto width) {
    launch("attention_tile", attention_tile_kernel<width(), E>,
           dim3(static_cast<unsigned>(rows.num_tiles * args.cache.N)), kTileThreads, kTileBytes<width(), E>,
           queue, args, rows);
  });
}

}  // namespace rlhf::kernels::RLHF_GPU

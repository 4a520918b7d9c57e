#pragma once
// Backward of attention_tiles.cuh on tensor cores, without atomics. delta, the rows' sums of dout . out,
// once; dQ as forward goes, per tile of rows over the keys; dK and dV per four blocks of keys, a warp for
// each, over the rows that see them, in order, or two warps, which take 16 rows in turn. Scores and weights
// are computed again from the kept log-sum-exp; weights and slopes are rounded to bf16 for the products, sums
// are float.

#include "rlhf/kernels/cuda/attention_tiles.cuh"

namespace rlhf::kernels::RLHF_GPU {

static_assert(kBlocksPerGroup == kTileWarps);
/// Warps that share the rows of a block of keys: two hide more latency, where registers allow it.
template <int kWidth>
constexpr int kSides = kWidth <= 64 ? 2 : 1;
template <int kWidth>
constexpr int kKeyGradThreads = kSides<kWidth>* kTileThreads;

/// sum over h of dout . out of one head: the part of the softmax's gradient that all keys share.
template <class T>
__device__ inline float head_delta(const T* dout, const T* out, std::int64_t H) {
  float sum = 0;
  for (std::int64_t h = lane_id(); h < H; h += kWarp) sum += to_float(dout[h]) * to_float(out[h]);
  return warp_sum(sum);
}

/// A warp per head of a row.
template <class T>
__global__ void attention_delta_kernel(PassAttentionGradArgs<T> args, std::int64_t heads) {
  const std::int64_t head = static_cast<std::int64_t>(blockIdx.x) * num_warps() + warp_id(), H = args.cache.H;
  if (head >= heads) return;
  const float delta = head_delta(args.dout + head * H, args.out + head * H, H);
  if (lane_id() == 0) args.workspace[head] = delta;
}

/// From products q . k to the keys' weights, in place, and from dout . v to their slopes, both without the
/// scale that dQ and dK are multiplied with in the end.
/// @param log2_total, delta functions of a fragment's place: log-sum-exp in exponents of 2, and delta
template <class Log2Total, class Delta>
__device__ inline void weights_and_slopes(float (&s)[2][4], float (&dots)[2][4],
                                          const AttentionArgs<Bfloat16>& cache, const Log2Total& log2_total,
                                          const Delta& delta) {
  const float scale = static_cast<float>(cache.scale), softcap = static_cast<float>(cache.softcap);
  if (softcap > 0) {
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float bend = tanhf(s[j][e] * scale / softcap);
        s[j][e] = power_of_two(softcap * bend * kLog2e - log2_total(j, e));
        dots[j][e] = s[j][e] * (dots[j][e] - delta(j, e)) * (1 - bend * bend);
      }
    return;
  }
#pragma unroll
  for (int j = 0; j < 2; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      s[j][e] = power_of_two(s[j][e] * (scale * kLog2e) - log2_total(j, e));
      dots[j][e] = s[j][e] * (dots[j][e] - delta(j, e));
    }
}

/// K of the last block of a tile is zero where it has no key, whatever is there: dQ multiplies it by 0.
template <int kWidth>
__device__ inline void clear_keys(Bfloat16* keys, int first, int end) {
  const int in_tile = (end - first) / kBlockKeys, slots = (end - first) % kBlockKeys;
  Bfloat16* block = keys + in_tile * KeyTile<kWidth>::kBlockElements;
  for (int i = static_cast<int>(threadIdx.x); i < KeyTile<kWidth>::kBlockElements; i += kTileThreads)
    if (i % kBlockKeys >= slots) block[KeyMajor::chunk(i / 8) + i % 8] = {0};
}

template <int kWidth>
__global__ void __launch_bounds__(kTileThreads, kWidth <= 64 ? 3 : 2)
    attention_tile_dq_kernel(PassAttentionGradArgs<Bfloat16> args, PassRows rows) {
  using Tile = KeyTile<kWidth>;
  using Values = Padded<kWidth>;
  const QueryTile tile = query_tile(args.cache, rows, args.window);
  const int row = warp_id() * kMmaRows, left = tile.rows - row;
  const RowsOfWarp mine = {tile.position + row, static_cast<int>(args.window)};
  Bfloat16* keys = block_shared<Bfloat16>();  // two tiles

  const std::int64_t N = args.cache.N, head = matrix_offset(tile.first_row + row, tile.n, N);
  unsigned q[kWidth / 16][4], dout[kWidth / 16][4];
  load_rows<kWidth>(q, args.q + head * kWidth, N * kWidth, left);
  load_rows<kWidth>(dout, args.dout + head * kWidth, N * kWidth, left);
  float log2_total[2] = {}, delta[2] = {}, dq[kWidth / 8][4] = {};
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const int r = fragment_row(2 * side);
    if (r >= left) continue;
    log2_total[side] = args.lse[head + r * N] * kLog2e;
    delta[side] = args.workspace[head + r * N];
  }

  const int begin = tile.first_key / Tile::kKeys * Tile::kKeys;
  int place = 0;
  for (int first = begin - Tile::kKeys; first < tile.num_keys; first += Tile::kKeys) {
    wait_for_copies();
    __syncthreads();  // the tile is there, and every warp has left the one before
    const bool more = first + Tile::kKeys < tile.num_keys;
    if (more) load_keys<kWidth>(keys + place * Tile::kElements, args.cache, tile, first + Tile::kKeys);
    place = 1 - place;
    if (first < begin) continue;
    Bfloat16* here = keys + place * Tile::kElements;
    if (!more && tile.num_keys % kBlockKeys != 0) {
      clear_keys<kWidth>(here, first, tile.num_keys);
      __syncthreads();
    }
    const Bfloat16* v = here + Tile::kV + Values::template lane<false>();
#pragma unroll 1
    for (int block = 0; block < Tile::kBlocks; ++block) {
      const int key = first + block * kBlockKeys;
      if (left <= 0 || !mine.see_any(key, kBlockKeys)) continue;
      const Bfloat16* k = here + block * Tile::kBlockElements;
      float s[2][4] = {}, dots[2][4] = {};
#pragma unroll
      for (int i = 0; i < kWidth / 16; ++i) {
        multiply_add_row<true>(s, q[i], k + KeyMajor::lane<true>() + i * KeyMajor::kPiece, 0);
        multiply_add_row<false>(dots, dout[i], v + block * Values::kPiece + 16 * i, 0);
      }
      weights_and_slopes(
          s, dots, args.cache, [&](int, int e) { return log2_total[e / 2]; },
          [&](int, int e) { return delta[e / 2]; });
      if (!mine.see_all(key, kBlockKeys)) {
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (!mine.sees(fragment_row(e), key + fragment_column(j, e))) dots[j][e] = 0;
      }
      unsigned a[4];
      pack_rows(a, dots, 0);
      multiply_add_row<false>(dq, a, k + KeyMajor::lane<false>(), KeyMajor::kPiece);
    }
  }
#pragma unroll
  for (int j = 0; j < kWidth / 8; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (fragment_row(e) < left)
        args.dq[matrix_offset(tile.first_row + row + fragment_row(e), tile.n * kWidth + fragment_column(j, e),
                              args.dq_stride)] =
            from_float<Bfloat16>(dq[j][e] * static_cast<float>(args.cache.scale));
}

/// Rows that see some keys, for the query heads of one kv head, in shared memory: q, dout, then lse and
/// delta.
template <int kWidth>
struct RowTile {
  static constexpr int kRows = kWidth <= 64 ? 64 : 32;
  static constexpr int kDout = kRows * Padded<kWidth>::kStride, kElements = 2 * kDout;
  static constexpr int kFloats = 2 * kRows;
  static constexpr std::size_t kBytes = 2 * (kElements * sizeof(Bfloat16) + kFloats * sizeof(float));
  static_assert(kBytes >= kTileWarps * kBlockKeys * kWidth * sizeof(float));  // sums of one side, in the end
};

/// The rows that see a run of blocks: ranges [.., last_range), up to the last position that sees a key of
/// them.
struct RowsOfRun {
  int last_range, last_position;
};

/// Goes through them a tile at a time, and each tile head by head. Ints: registers are scarce.
struct RowCursor {
  int range, row, end, head, position;  ///< of `row`

  __device__ bool done(const RowsOfRun& run) const { return range >= run.last_range; }
  __device__ void enter_range(const std::int64_t* ranges, const PassRows& rows, const RowsOfRun& run) {
    for (; range < run.last_range; ++range) {
      row = static_cast<int>(ranges[2 * range]);
      end = static_cast<int>(ranges[2 * range + 1]);
      if (row >= end) continue;
      position = rows.positions[row];
      if (end - row > run.last_position - position) end = row + run.last_position - position + 1;
      if (row < end) return;
    }
  }
  __device__ void advance(const std::int64_t* ranges, const PassRows& rows, const RowsOfRun& run, int count,
                          int heads) {
    if (++head < heads) return;
    head = 0;
    row += count;
    position += count;
    if (row < end) return;
    ++range;
    enter_range(ranges, rows, run);
  }
};

template <int kWidth>
__device__ inline void load_row_tile(Bfloat16* to, float* numbers,
                                     const PassAttentionGradArgs<Bfloat16>& args, const RowCursor& at,
                                     std::int64_t first_head) {
  using Tile = RowTile<kWidth>;
  constexpr int kChunks = kWidth / 8, kAtOnce = kKeyGradThreads<kWidth> / kChunks;
  const int thread = static_cast<int>(threadIdx.x), h = thread % kChunks * 8;
  const std::int64_t N = args.cache.N, first = matrix_offset(at.row, first_head + at.head, N);
  const std::int64_t begin = (first + thread / kChunks * N) * kWidth + h;
  Bfloat16* place = to + thread / kChunks * Padded<kWidth>::kStride + h;
#pragma unroll
  for (int i = 0; i < Tile::kRows; i += kAtOnce) {
    const int r = thread / kChunks + i;
    if (thread >= kAtOnce * kChunks || r >= Tile::kRows) break;
    const bool valid = at.row + r < at.end;
    const std::int64_t from = valid ? begin + i * N * kWidth : 0;  // nothing is read where it is not valid
    copy_later<16>(place + i * Padded<kWidth>::kStride, args.q + from, valid);
    copy_later<16>(place + Tile::kDout + i * Padded<kWidth>::kStride, args.dout + from, valid);
  }
  if (thread >= Tile::kRows) return;
  const bool valid = at.row + thread < at.end;
  const std::int64_t from = valid ? first + thread * N : 0;
  copy_later<4>(numbers + thread, args.lse + from, valid);
  copy_later<4>(numbers + Tile::kRows + thread, args.workspace + from, valid);
}

/// The warp's block of keys as A, keys being rows.
template <int kWidth>
__device__ inline void load_block(unsigned (&k)[kWidth / 16][4], unsigned (&v)[kWidth / 16][4],
                                  const Bfloat16* from_k, const Bfloat16* from_v) {
#pragma unroll
  for (int i = 0; i < kWidth / 16; ++i)
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const int key = lane_id() / 4 + part % 2 * 8, h = 16 * i + 2 * (lane_id() % 4) + part / 2 * 8;
      k[i][part] =
          from_k[key_offset(key, h)].bits | static_cast<unsigned>(from_k[key_offset(key, h + 1)].bits) << 16;
      v[i][part] = load_pair(from_v + value_offset(key, h, kWidth));
    }
}

/// Block `next` goes on where the one before ends: the sequence that sees it first sees that one too, and so
/// do all that see it.
__device__ inline bool goes_on(const BlockUses& uses, const PassRows& rows, int next) {
  const std::int32_t first_key = uses.first_keys[next - 1];
  if (uses.first_keys[next] != first_key + kBlockKeys || uses.offsets[next] == uses.offsets[next + 1])
    return false;
  return rows.tables[uses.ranges[2 * uses.offsets[next]]][first_key / kBlockKeys] == next - 1;
}

/// What a warp needs to know of a tile of rows.
struct TileForWarp {
  int position, rows;  ///< of the first row; how many there are, 0 behind the last tile
  bool sees;           ///< their sequence has the warp's block in its table
};
__device__ inline TileForWarp tile_for_warp(const PassRows& rows, const RowsOfRun& run, const RowCursor& at,
                                            int block, int first_key) {
  if (at.done(run)) return {0, 0, false};
  const int count = at.end - at.row;
  const bool reaches = at.position + count > first_key;  // so the table has an entry
  return {at.position, count, reaches && rows.tables[at.row][first_key / kBlockKeys] == block};
}

/// dK and dV of the warp's 16 keys.
template <int kWidth>
struct KeyGradients {
  float dk[kWidth / 8][4], dv[kWidth / 8][4];
};

template <int kWidth>
__device__ inline void add_rows(KeyGradients<kWidth>& sums, const unsigned (&k)[kWidth / 16][4],
                                const unsigned (&v)[kWidth / 16][4], const Bfloat16* tile,
                                const float* numbers, const RowsOfWarp& rows, int count, int first_key,
                                const AttentionArgs<Bfloat16>& cache) {
  using Rows = Padded<kWidth>;
  using Tile = RowTile<kWidth>;
  const Bfloat16* columns = tile + Rows::template lane<false>();
  float s[2][4] = {}, dots[2][4] = {};  // keys x rows
#pragma unroll
  for (int i = 0; i < kWidth / 16; ++i) {
    multiply_add_row<false>(s, k[i], columns + 16 * i, 0);
    multiply_add_row<false>(dots, v[i], columns + Tile::kDout + 16 * i, 0);
  }
  weights_and_slopes(
      s, dots, cache, [&](int j, int e) { return numbers[fragment_column(j, e)] * kLog2e; },
      [&](int j, int e) { return numbers[Tile::kRows + fragment_column(j, e)]; });
  if (count < kMmaRows || !rows.see_all(first_key, kBlockKeys)) {
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = fragment_column(j, e);
        if (row < count && rows.sees(row, first_key + fragment_row(e))) continue;
        s[j][e] = dots[j][e] = 0;
      }
  }
  const Bfloat16* down = tile + Rows::template lane<true>();
  unsigned a[4];
  pack_rows(a, s, 0);
  multiply_add_row<true>(sums.dv, a, down + Tile::kDout, 16);
  pack_rows(a, dots, 0);
  multiply_add_row<true>(sums.dk, a, down, 16);
}

/// Adds the sums of the other side's warp, through shared memory.
template <int kWidth>
__device__ inline void add_other_side(float (&sums)[kWidth / 8][4], float* shared) {
  constexpr int kEach = kWidth / 2 * kWarp;  // floats of a warp
  float* const place = shared + warp_id() % kTileWarps * kEach + lane_id();
  __syncthreads();  // nobody reads what is there
  if (warp_id() >= kTileWarps) {
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) place[i * kWarp] = sums[i / 4][i % 4];
  }
  __syncthreads();
  if (warp_id() >= kTileWarps) return;
#pragma unroll
  for (int i = 0; i < kWidth / 2; ++i) sums[i / 4][i % 4] += place[i * kWarp];
}

template <int kWidth>
__device__ inline void store_gradients(const PassAttentionGradArgs<Bfloat16>& args,
                                       const KeyGradients<kWidth>& sums, std::int64_t at) {
#pragma unroll
  for (int j = 0; j < kWidth / 8; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int key = fragment_row(e), h = fragment_column(j, e);
      args.dk[at + key_offset(key, h)] = sums.dk[j][e] * static_cast<float>(args.cache.scale);
      args.dv[at + value_offset(key, h, kWidth)] = sums.dv[j][e];
    }
}

/// Of the four that this block of threads has; read again where it is needed, registers being scarce.
__device__ inline int first_block(const BlockUses& uses) {
  return uses.groups[blockIdx.x] * kTileWarps;
}

/// Blocks first .. end of one sequence; warps w and w + 4 (where there are
/// two sides) have block w.
template <int kWidth>
__device__ inline void attend_back(const PassAttentionGradArgs<Bfloat16>& args, const PassRows& rows,
                                   int first, int end) {
  using Tile = RowTile<kWidth>;
  const AttentionArgs<Bfloat16>& cache = args.cache;
  const BlockUses& uses = args.uses;
  const std::int64_t g = blockIdx.y;
  const int group = static_cast<int>(cache.N / cache.G);
  // Not asked for where there is one side: those kernels have no register to spare.
  const int side = kSides<kWidth> == 1 ? 0 : warp_id() / kTileWarps;
  const int block = first_block(uses) + warp_id() - side * kTileWarps;
  const bool mine = block >= first && block < end;
  const int first_key = mine ? uses.first_keys[block] : 0, window = static_cast<int>(args.window);
  const std::int64_t at = head_offset(mine ? block : first, cache.block_stride, g, kWidth);
  Bfloat16* tiles = block_shared<Bfloat16>();  // two, then their numbers
  float* numbers = reinterpret_cast<float*>(tiles + 2 * Tile::kElements);

  unsigned k[kWidth / 16][4], v[kWidth / 16][4];
  load_block<kWidth>(k, v, cache.k + at, cache.v + at);
  KeyGradients<kWidth> sums;
#pragma unroll
  for (int j = 0; j < kWidth / 8; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) sums.dk[j][e] = sums.dv[j][e] = 0;

  const int last_key = uses.first_keys[end - 1] + kBlockKeys - 1;
  const RowsOfRun run = {static_cast<int>(uses.offsets[first + 1]),
                         window > 0 ? last_key + window - 1 : INT32_MAX - 1};
  RowCursor next = {static_cast<int>(uses.offsets[first]), 0, 0, 0, 0};
  next.enter_range(uses.ranges, rows, run);
  TileForWarp here = {0, 0, false};
  int place = 0;
  do {
    wait_for_copies();
    __syncthreads();  // tile `here` is there, and every warp has left the one before
    const TileForWarp coming = tile_for_warp(rows, run, next, mine ? block : -1, first_key);
    if (coming.rows > 0) {
      load_row_tile<kWidth>(tiles + place * Tile::kElements, numbers + place * Tile::kFloats, args, next,
                            g * group);
      next.advance(uses.ranges, rows, run, Tile::kRows, group);
    }
    place = 1 - place;
    const Bfloat16* tile = tiles + place * Tile::kElements;
    const float* of_tile = numbers + place * Tile::kFloats;
#pragma unroll 1
    for (int row = side * kMmaRows; row < Tile::kRows && row < here.rows; row += kSides<kWidth> * kMmaRows) {
      const RowsOfWarp of_step = {here.position + row, window};
      if (!here.sees || !of_step.see_any(first_key, kBlockKeys)) continue;
      add_rows<kWidth>(sums, k, v, tile + row * Padded<kWidth>::kStride, of_tile + row, of_step,
                       here.rows - row, first_key, cache);
    }
    here = coming;
  } while (here.rows > 0);
  __syncthreads();  // holds the compiler back: it would prepare the next blocks early and spill
  if constexpr (kSides<kWidth> == 2) {
    add_other_side<kWidth>(sums.dk, block_shared<float>());
    add_other_side<kWidth>(sums.dv, block_shared<float>());
  }
  if (mine && side == 0) store_gradients<kWidth>(args, sums, at);
}

/// Four blocks of keys of one kv head; those of one sequence at once.
template <int kWidth>
__global__ void __launch_bounds__(kKeyGradThreads<kWidth>, kSides<kWidth> == 2 ? 1 : 2)
    attention_tile_dkv_kernel(PassAttentionGradArgs<Bfloat16> args, PassRows rows) {
  const int begin = first_block(args.uses), count = static_cast<int>(args.uses.num_blocks);
  const int limit = begin + kTileWarps < count ? begin + kTileWarps : count;
  for (int first = begin, end = begin; first < limit; first = end) {
    for (end = first + 1; end < limit && goes_on(args.uses, rows, end);) ++end;
    attend_back<kWidth>(args, rows, first, end);
  }
}

inline bool tensor_cores_take(const PassAttentionGradArgs<Bfloat16>& args) {
  return args.workspace && tensor_cores_take(args.cache) && aligned(args.q, 16) && aligned(args.dout, 16);
}

/// dQ of the rows in tiles, dK and dV of all.
inline void launch_attention_tiles_grad(const PassAttentionGradArgs<Bfloat16>& args, const PassRows& rows,
                                        void* queue) {
  const std::int64_t N = args.cache.N, heads = rows.count * N;
  launch("attention_delta", attention_delta_kernel<Bfloat16>,
         dim3(static_cast<unsigned>(ceil_div(heads, kTileWarps))), kTileThreads, 0, queue, args, heads);
  with_head_width(args.cache.H, [&](auto width) {
    launch("attention_tile_dq", attention_tile_dq_kernel<width()>,
           dim3(static_cast<unsigned>(rows.num_tiles * N)), kTileThreads, KeyTile<width()>::kBytes, queue,
           args, rows);
    launch("attention_tile_dkv", attention_tile_dkv_kernel<width()>,
           dim3(static_cast<unsigned>(ceil_div(args.uses.num_blocks, kTileWarps)),
                static_cast<unsigned>(args.cache.G)),
           kKeyGradThreads<width()>, RowTile<width()>::kBytes, queue, args, rows);
  });
}

}  // namespace rlhf::kernels::RLHF_GPU

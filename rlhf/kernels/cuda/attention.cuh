#pragma once
// Attention of every row over the blocks of its sequence, with an online softmax in float (Milakov &
// Gimelshein 2018; flash-decoding, Dao et al. 2023). Grid: (row, tile of query heads of one kv head) x part
// of kKeysPerPart keys; the four warps of a block take the K/V blocks of the part in turn. A tile holds up to
// kHeads heads, so K and V are read once for all of them. Parts are summed by a second kernel when a row has
// more than one. Which keys belong to a part and which warp takes a block depends on the key alone: a row's
// result has the same bits in any batch.
//
// Scores: lane l works for key l % 16 on the elements 2 i + l / 16, so that a warp reads 32 neighbouring
// elements of K. Values: lane l owns the output elements l, l + 32, ... Bound: reading K and V once per tile.

#include <cmath>

#include "rlhf/kernels/cuda/append.cuh"  // check_head_width
#include "rlhf/kernels/cuda/attention_tiles.cuh"
#include "rlhf/kernels/cuda/reduce.cuh"
#include "rlhf/kernels/device_kernels.h"

namespace rlhf::kernels::RLHF_GPU {

constexpr int kAttentionWarps = 4;
constexpr int kKeys = static_cast<int>(kBlockTokens);
static_assert(2 * kKeys == kWarp, "a lane is a key and one of two halves of a head");

/// Rows that are taken one by one, and the i-th of them.
RLHF_HOST_DEVICE inline std::int64_t num_single_rows(const PassRows& rows) {
  return rows.num_tiles > 0 ? rows.num_single_rows : rows.count;
}
__device__ inline std::int64_t single_row(const PassRows& rows, std::int64_t i) {
  return rows.num_tiles > 0 ? rows.single_rows[i] : i;
}
/// The same pass without tiles.
inline PassRows without_tiles(PassRows rows) {
  rows.num_tiles = 0;
  return rows;
}

/// Where a block works: a row and up to kHeads query heads of one kv head.
struct AttentionTile {
  std::int64_t t, g, first_head;
  int heads;
  std::int64_t first_key, num_keys;  ///< that the row sees
};

template <int kHeads, class T>
__device__ inline AttentionTile attention_tile(const AttentionArgs<T>& cache, const PassRows& rows,
                                               std::int64_t window) {
  const std::int64_t group = cache.N / cache.G, tiles = ceil_div(group, kHeads);
  const std::int64_t t = single_row(rows, blockIdx.x / (cache.G * tiles)),
                     rest = blockIdx.x % (cache.G * tiles);
  const std::int64_t g = rest / tiles, first = rest % tiles * kHeads;
  const std::int64_t heads = group - first < kHeads ? group - first : kHeads, position = rows.positions[t];
  return {t,           g, g * group + first, static_cast<int>(heads), first_visible_key(position, window),
          position + 1};
}

/// Part of a block of keys that a row sees.
struct KeyRange {
  int begin, end;
};
__device__ inline KeyRange visible_keys(std::int64_t block, std::int64_t first_key, std::int64_t num_keys) {
  const std::int64_t base = block * kBlockTokens;
  return {first_key > base ? static_cast<int>(first_key - base) : 0,
          num_keys - base < kBlockTokens ? static_cast<int>(num_keys - base) : kKeys};
}

/// Maximum and sum over the 16 keys; lanes l and l + 16 hold the same key.
__device__ inline float key_max(float value) {
  for (int distance = kKeys / 2; distance > 0; distance /= 2)
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, distance));
  return value;
}
__device__ inline float key_sum(float value) {
  for (int distance = kKeys / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

/// Scores of the lane's key for each head: q[n][H] (shared memory) times K, scaled and soft-capped; -inf when
/// the key is not visible.
template <int kHeads, class T>
__device__ inline void key_scores(const AttentionArgs<T>& cache, const T* k, const float* q, int heads,
                                  KeyRange keys, float (&scores)[kHeads]) {
  const int key = lane_id() % kKeys, side = lane_id() / kKeys;
  for (int n = 0; n < kHeads; ++n) scores[n] = 0;
  for (std::int64_t h = side; h < cache.H; h += 2) {
    const float element = to_float(k[key_offset(key, h)]);
#pragma unroll
    for (int n = 0; n < kHeads; ++n)
      if (n < heads) scores[n] += q[n * cache.H + h] * element;
  }
  const float scale = static_cast<float>(cache.scale), cap = static_cast<float>(cache.softcap);
#pragma unroll
  for (int n = 0; n < kHeads; ++n) {
    scores[n] = (scores[n] + __shfl_xor_sync(kAllLanes, scores[n], kKeys)) * scale;
    if (cap > 0) scores[n] = cap * tanhf(scores[n] / cap);
    if (key < keys.begin || key >= keys.end) scores[n] = -INFINITY;
  }
}

/// Softmax state of a tile of heads: lane l holds the output elements l + 32 e.
template <int kHeads, int kElements>
struct OnlineSoftmax {
  float maximum[kHeads], total[kHeads], sum[kHeads][kElements];
};

template <int kHeads, int kElements, class T>
__device__ inline void add_block(OnlineSoftmax<kHeads, kElements>& state, const AttentionArgs<T>& cache,
                                 const T* k, const T* v, const float* q, int heads, KeyRange keys) {
  float p[kHeads];
  key_scores<kHeads>(cache, k, q, heads, keys, p);
#pragma unroll
  for (int n = 0; n < kHeads; ++n) {
    const float maximum = fmaxf(state.maximum[n], key_max(p[n])),
                correction = expf(state.maximum[n] - maximum);
    p[n] = expf(p[n] - maximum);
    state.maximum[n] = maximum;
    state.total[n] = state.total[n] * correction + key_sum(p[n]);
#pragma unroll
    for (int e = 0; e < kElements; ++e) state.sum[n][e] *= correction;
  }
  for (int key = keys.begin; key < keys.end; ++key) {  // other slots may hold anything, NaN too
    float value[kElements];
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const std::int64_t h = lane_id() + kWarp * e;
      value[e] = h < cache.H ? to_float(v[value_offset(key, h, cache.H)]) : 0;
    }
#pragma unroll
    for (int n = 0; n < kHeads; ++n) {
      const float weight = __shfl_sync(kAllLanes, p[n], key);
#pragma unroll
      for (int e = 0; e < kElements; ++e) state.sum[n][e] += weight * value[e];
    }
  }
}

/// Copies the tile's heads of x to shared memory as floats.
template <class T>
__device__ inline void load_heads(float* to, const T* x, std::int64_t elements) {
  for (std::int64_t i = threadIdx.x; i < elements; i += blockDim.x) to[i] = to_float(x[i]);
}

template <class T, int kHeads, int kElements>
__global__ void attention_kernel(PassAttentionArgs<T> args, PassRows rows, std::int64_t max_parts) {
  const AttentionArgs<T>& cache = args.cache;
  const std::int64_t H = cache.H;
  const AttentionTile tile = attention_tile<kHeads>(cache, rows, args.window);
  const PartRange parts = visible_parts(tile.first_key, tile.num_keys);
  if (blockIdx.y >= parts.count) return;
  float* q = block_shared<float>();                   // [kHeads][H]
  float* maxima = q + kHeads * H;                     // [warps][kHeads]
  float* totals = maxima + kAttentionWarps * kHeads;  // [warps][kHeads]
  float* sums = totals + kAttentionWarps * kHeads;    // [warps][kHeads][H]
  load_heads(q, args.q + matrix_offset(tile.t, tile.first_head * H, args.q_stride), tile.heads * H);
  __syncthreads();

  OnlineSoftmax<kHeads, kElements> state;
#pragma unroll
  for (int n = 0; n < kHeads; ++n) {
    state.maximum[n] = -1e30F;  // finite: a warp without keys must give 0, not NaN
    state.total[n] = 0;
#pragma unroll
    for (int e = 0; e < kElements; ++e) state.sum[n][e] = 0;
  }
  constexpr std::int64_t kBlocksPerPart = kKeysPerPart / kBlockTokens;
  const std::int64_t part_begin = (parts.first + blockIdx.y) * kBlocksPerPart;
  const std::int64_t num_blocks = ceil_div(tile.num_keys, kBlockTokens);
  const std::int64_t end =
      part_begin + kBlocksPerPart < num_blocks ? part_begin + kBlocksPerPart : num_blocks;
  for (std::int64_t b = part_begin + warp_id(); b < end; b += kAttentionWarps) {
    if ((b + 1) * kBlockTokens <= tile.first_key) continue;
    const std::int64_t at = head_offset(rows.tables[tile.t][b], cache.block_stride, tile.g, H);
    add_block<kHeads, kElements>(state, cache, cache.k + at, cache.v + at, q, tile.heads,
                                 visible_keys(b, tile.first_key, tile.num_keys));
  }
#pragma unroll
  for (int n = 0; n < kHeads; ++n) {
    if (lane_id() == 0) {
      maxima[warp_id() * kHeads + n] = state.maximum[n];
      totals[warp_id() * kHeads + n] = state.total[n];
    }
#pragma unroll
    for (int e = 0; e < kElements; ++e)
      if (lane_id() + kWarp * e < H)
        sums[(warp_id() * kHeads + n) * H + lane_id() + kWarp * e] = state.sum[n][e];
  }
  __syncthreads();

  for (std::int64_t i = threadIdx.x; i < tile.heads * H; i += blockDim.x) {
    const std::int64_t n = i / H, head = tile.first_head + n;
    float maximum = maxima[n], total = 0, sum = 0;
    for (int warp = 1; warp < kAttentionWarps; ++warp) maximum = fmaxf(maximum, maxima[warp * kHeads + n]);
    for (int warp = 0; warp < kAttentionWarps; ++warp) {
      const float weight = expf(maxima[warp * kHeads + n] - maximum);
      total += weight * totals[warp * kHeads + n];
      sum += weight * sums[warp * kHeads * H + i];
    }
    if (parts.count == 1) {
      args.out[matrix_offset(tile.t, tile.first_head * H + i, cache.N * H)] = from_float<T>(sum / total);
      if (args.lse && i % H == 0) args.lse[matrix_offset(tile.t, head, cache.N)] = maximum + logf(total);
    } else {
      float* partial = args.workspace + part_offset(tile.t, head, blockIdx.y, cache.N, max_parts, H);
      partial[i % H] = sum;
      if (i % H == 0) {
        partial[H] = maximum;
        partial[H + 1] = total;
      }
    }
  }
}

/// Sums the parts of one (row, head), in order.
template <class T>
__global__ void attention_parts_kernel(PassAttentionArgs<T> args, PassRows rows, std::int64_t max_parts) {
  const std::int64_t N = args.cache.N, H = args.cache.H, n = blockIdx.x % N;
  const std::int64_t t = single_row(rows, blockIdx.x / N);
  const std::int64_t position = rows.positions[t];
  const PartRange parts = visible_parts(first_visible_key(position, args.window), position + 1);
  if (parts.count == 1) return;
  const float* partial = args.workspace + part_offset(t, n, 0, N, max_parts, H);
  float maximum = partial[H];
  for (std::int64_t part = 1; part < parts.count; ++part)
    maximum = fmaxf(maximum, partial[part * (H + 2) + H]);
  for (std::int64_t h = threadIdx.x; h < H; h += blockDim.x) {
    float total = 0, sum = 0;
    for (std::int64_t part = 0; part < parts.count; ++part) {
      const float* from = partial + part * (H + 2);
      const float weight = expf(from[H] - maximum);
      total += weight * from[H + 1];
      sum += weight * from[h];
    }
    args.out[matrix_offset(t, n * H + h, N * H)] = from_float<T>(sum / total);
    if (args.lse && h == 0) args.lse[matrix_offset(t, n, N)] = maximum + logf(total);
  }
}

inline std::size_t attention_shared_bytes(int heads, std::int64_t H) {
  const std::int64_t floats = heads * H * (1 + kAttentionWarps) + 2 * kAttentionWarps * heads;
  return static_cast<std::size_t>(floats) * sizeof(float);
}

template <class T, int kHeads, int kElements>
void launch_attention(const PassAttentionArgs<T>& args, const PassRows& rows, void* queue) {
  const std::int64_t tiles = args.cache.G * ceil_div(args.cache.N / args.cache.G, kHeads);
  const std::int64_t parts = max_attention_parts(rows.max_keys, args.window);
  launch("attention", attention_kernel<T, kHeads, kElements>,
         dim3(static_cast<unsigned>(num_single_rows(rows) * tiles), static_cast<unsigned>(parts)),
         kAttentionWarps * kWarp, attention_shared_bytes(kHeads, args.cache.H), queue, args, rows, parts);
  if (parts > 1)
    launch("attention_parts", attention_parts_kernel<T>,
           dim3(static_cast<unsigned>(num_single_rows(rows) * args.cache.N)), 64, 0, queue, args, rows,
           parts);
}

template <class T>
void attention_of_rows(const PassAttentionArgs<T>& args, const PassRows& rows, void* queue) {
  const std::int64_t H = args.cache.H, group = args.cache.N / args.cache.G;
  const bool one = group == 1, narrow = H <= 64, middle = H <= 128;
  if (narrow)
    one ? launch_attention<T, 1, 2>(args, rows, queue) : launch_attention<T, 4, 2>(args, rows, queue);
  else if (middle)
    one ? launch_attention<T, 1, 4>(args, rows, queue) : launch_attention<T, 4, 4>(args, rows, queue);
  else
    one ? launch_attention<T, 1, 8>(args, rows, queue) : launch_attention<T, 4, 8>(args, rows, queue);
}

template <class T>
void attention(const PassAttentionArgs<T>& args, const PassRows& rows, void* queue) {
  check_head_width(args.cache.H);
  if constexpr (sizeof(T) == sizeof(Bfloat16)) {
    const bool pairs = args.q_stride % 2 == 0 && aligned(args.q, 4) && aligned(args.out, 4);
    if (rows.num_tiles > 0 && pairs && tensor_cores_take(args.cache)) {
      launch_attention_tiles(args, rows, queue);
      return attention_of_rows(args, rows, queue);
    }
  }
  attention_of_rows(args, without_tiles(rows), queue);
}

}  // namespace rlhf::kernels::RLHF_GPU

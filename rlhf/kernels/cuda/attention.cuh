#pragma once
// Attention of every row over the blocks of its sequence, with an online softmax in float (Milakov &
// Gimelshein 2018; flash-decoding, Dao et al. 2023). Grid: (row, tile of query heads of one kv head) x part
// of kKeysPerPart keys; the four warps of a block take the K/V blocks of the part in turn. A tile holds up to
// kHeads heads, so K and V are read once for all of them. Parts are summed by a second kernel when a row has
// more than one. Which keys belong to a part and which warp takes a block depends on the key alone: a row's
// result has the same bits in any batch.
//
// A part goes through three steps with a barrier between: scores of all its keys into shared memory, softmax
// over them, weighted sum of the values. So the blocks of keys do not wait for one another. A lane reads 16
// bytes of K or V at a time (with bf16: 8 keys of one element, 8 elements of one value), keeps sums of its
// own for every head, and lanes are summed once at the end. Bound: reading K and V once per tile. Scales of
// keys in Float8 are applied to their scores, those of values to their weights.

#include <cmath>

#include "rlhf/kernels/cuda/append.cuh"  // check_head_width
#include "rlhf/kernels/cuda/attention_tiles_fp8.cuh"
#include "rlhf/kernels/cuda/wide.cuh"
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
  std::int64_t place;  ///< of the row among those that are taken one by one
  std::int64_t t, g, first_head;
  int heads;
  std::int64_t first_key, num_keys;  ///< that the row sees
};

template <int kHeads, class T, class E>
__device__ inline AttentionTile attention_tile(const AttentionArgs<T, E>& cache, const PassRows& rows,
                                               std::int64_t window) {
  const std::int64_t group = cache.N / cache.G, tiles = ceil_div(group, kHeads);
  const std::int64_t place = blockIdx.x / (cache.G * tiles), rest = blockIdx.x % (cache.G * tiles);
  const std::int64_t t = single_row(rows, place);
  const std::int64_t g = rest / tiles, first = rest % tiles * kHeads;
  const std::int64_t heads = group - first < kHeads ? group - first : kHeads, position = rows.positions[t];
  return {place,       t, g, g * group + first, static_cast<int>(heads), first_visible_key(position, window),
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

/// For the gradient: scores of the lane's key, lane_id() % 16, for each head: q[n][H] (shared memory) times
/// K, scaled and soft-capped; -inf when the key is not visible.
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

constexpr int kPartKeys = static_cast<int>(kKeysPerPart), kPartBlocks = kPartKeys / kKeys;
/// Loads in flight per lane: enough to keep memory busy, few enough for the registers.
constexpr int kLoadsInFlight = 8;

/// Asks for the 16 keys or values of a head.
template <class E>
__device__ inline void prefetch_head(const E* x, int H) {
  constexpr int kLine = 128 / sizeof(E);
  for (int i = lane_id() * kLine; i < kKeys * H; i += kWarp * kLine) prefetch_line(x + i);
}

/// Scales of K and V: the square of kHalfUnit makes up for element()'s unit.
template <class E>
constexpr bool kScaled = kScaleRows<E> > 0;
/// The scale of the lane's slot, lane_id() % 16, of a head.
template <class E>
__device__ inline float slot_scale(const E* head, int H) {
  return scale_value({head[scale_offset(lane_id() % kKeys, H)].bits});
}

/// Elements of a head, padded to what the lanes of a warp hold.
template <int kElements>
constexpr int kWidth = kElements* kWarp;

/// Scores of the 16 keys of a block for each head, scaled and soft-capped: q[kWidth][kHeads] times K, into
/// scores[key][kHeads]; both in shared memory. A lane works for kVector neighbouring keys on every kRows-th
/// element of the head. Slots without a key hold anything, NaN too, and give such scores.
template <int kHeads, int kElements, class T, class E>
__device__ inline void score_block(const AttentionArgs<T, E>& cache, const E* k, const float* q,
                                   float* scores) {
  constexpr int kKeyLanes = kKeys / kVector<E>, kRows = kWarp / kKeyLanes, kSums = kHeads * kVector<E>;
  constexpr int kLoads = kWidth<kElements> / kRows,
                kBatch = kLoads < kLoadsInFlight ? kLoads : kLoadsInFlight;
  const int first_key = lane_id() % kKeyLanes * kVector<E>, row = lane_id() / kKeyLanes;
  const int rows_left = static_cast<int>(cache.H) - row;
  const E* lane_k = k + key_offset(first_key, row);
  float lane_scale = 1;
  if constexpr (kScaled<E>) lane_scale = slot_scale(k, static_cast<int>(cache.H));
  const float* lane_q = q + row * kHeads;
  float sums[kSums] = {};
#pragma unroll
  for (int first = 0; first < kLoads; first += kBatch) {
    Words words[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      words[i] = (first + i) * kRows < rows_left ? load_words(lane_k + (first + i) * kRows * kKeys) : Words{};
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
#pragma unroll
      for (int n = 0; n < kHeads; ++n) {
        const float query = lane_q[(first + i) * kRows * kHeads + n];
#pragma unroll
        for (int j = 0; j < kVector<E>; ++j) sums[n * kVector<E> + j] += query * element<E>(words[i], j);
      }
  }
  const float scale = static_cast<float>(cache.scale) * kHalfUnit<E>, cap = static_cast<float>(cache.softcap);
  const int first = spread_sums<kSums, kWarp / 2, kKeyLanes>(sums);
#pragma unroll
  for (int i = 0; i < kSumsLeft<kSums, kWarp / 2, kKeyLanes>; ++i) {
    const int n = (first + i) / kVector<E>, key = first_key + (first + i) % kVector<E>;
    if constexpr (kScaled<E>) sums[i] *= __shfl_sync(kAllLanes, lane_scale, key);
    float score = sums[i] * scale;
    if (cap > 0) score = cap * tanhf(score / cap);
    scores[key * kHeads + n] = score;
  }
}

/// Turns the scores of a part, [key][kHeads], into weights relative to the largest; 0 outside `keys`. A warp
/// per head. Where values have scales, the weights are multiplied by them, and the totals are not.
template <int kHeads, bool kScaledValues>
__device__ inline void weigh_part(float* scores, const float* value_scales, KeyRange keys, int heads,
                                  float* maxima, float* totals) {
  constexpr int kLaneKeys = kPartKeys / kWarp;
  for (int n = warp_id(); n < heads; n += kAttentionWarps) {
    float values[kLaneKeys], maximum = -INFINITY, total = 0;
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) {
      const int key = lane_id() + i * kWarp;
      values[i] = key >= keys.begin && key < keys.end ? scores[key * kHeads + n] : -INFINITY;
      maximum = fmaxf(maximum, values[i]);
    }
    maximum = warp_max(maximum);
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) {
      const int key = lane_id() + i * kWarp;
      const bool visible = key >= keys.begin && key < keys.end;
      const float weight = visible ? expf(values[i] - maximum) : 0;
      if constexpr (kScaledValues)
        scores[key * kHeads + n] = visible ? weight * value_scales[key] : 0;
      else
        scores[key * kHeads + n] = weight;
      total += weight;
    }
    total = warp_sum(total);
    if (lane_id() == 0) {
      maxima[n] = maximum;
      totals[n] = total;
    }
  }
}

/// What a lane adds up of the values: elements slot * kWarp * kVector + group() * kVector + j of every head,
/// of the keys number lane_id() / kLanes, + kKeysPerLoad, ...
template <int kHeads, int kElements, class E>
struct ValueSums {
  static constexpr int kGroups = kElements * kWarp / kVector<E>;  // of 16 bytes in a value
  static constexpr int kSlots = kGroups > kWarp ? kGroups / kWarp : 1;
  static constexpr int kLanes = kGroups / kSlots, kKeysPerLoad = kWarp / kLanes;
  static constexpr int kSize = kSlots * kHeads * kVector<E>;
  float at[kSize];  ///< [slot][head][kVector]

  __device__ static int element_of(int slot) { return (slot * kWarp + lane_id() % kLanes) * kVector<E>; }
};

/// Adds the visible values of a block, times weights[key][kHeads].
template <int kHeads, int kElements, class E>
__device__ inline void add_values(ValueSums<kHeads, kElements, E>& sums, const E* v, int H,
                                  const float* weights, KeyRange keys) {
  using Sums = ValueSums<kHeads, kElements, E>;
  constexpr int kLoads = kKeys / Sums::kKeysPerLoad * Sums::kSlots;
  constexpr int kBatch = kLoads < kLoadsInFlight ? kLoads : kLoadsInFlight;
  static_assert(kBatch % Sums::kSlots == 0);
  const bool wide = H % kVector<E> == 0;  // else a value does not start at a multiple of 16 bytes
  const int lane_key = lane_id() / Sums::kLanes;
#pragma unroll
  for (int first = 0; first < kLoads; first += kBatch) {
    Words words[kBatch];
    const auto load = [&](const auto& elements) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int key = (first + i) / Sums::kSlots * Sums::kKeysPerLoad + lane_key;
        const int h = Sums::element_of(i % Sums::kSlots);
        const bool visible = key >= keys.begin && key < keys.end && h < H;  // other slots may hold NaN
        words[i] = visible ? elements(v + (key * H + h), H - h) : Words{};
      }
    };
    if (wide)
      load([](const E* x, int) { return load_words(x); });
    else
      load([](const E* x, int count) { return load_elements(x, count, false); });
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int key = (first + i) / Sums::kSlots * Sums::kKeysPerLoad + lane_key;
#pragma unroll
      for (int n = 0; n < kHeads; ++n) {
        const float weight = weights[key * kHeads + n];
        float* sum = sums.at + (i % Sums::kSlots * kHeads + n) * kVector<E>;
#pragma unroll
        for (int j = 0; j < kVector<E>; ++j) sum[j] += weight * element<E>(words[i], j);
      }
    }
  }
}

/// Sums the lanes that share elements and writes to[n][H].
template <int kHeads, int kElements, class E>
__device__ inline void store_values(ValueSums<kHeads, kElements, E>& sums, int H, float* to) {
  using Sums = ValueSums<kHeads, kElements, E>;
  const int first = spread_sums<Sums::kSize, kWarp / 2, Sums::kLanes>(sums.at);
#pragma unroll
  for (int i = 0; i < kSumsLeft<Sums::kSize, kWarp / 2, Sums::kLanes>; ++i) {
    const int n = (first + i) / kVector<E> % kHeads, slot = (first + i) / (kVector<E> * kHeads);
    const int h = Sums::element_of(slot) + (first + i) % kVector<E>;
    if (h < H) to[n * H + h] = sums.at[i] * kHalfUnit<E>;
  }
}

/// Copies the tile's heads of x to shared memory as floats.
template <class T>
__device__ inline void load_heads(float* to, const T* x, std::int64_t elements) {
  for (std::int64_t i = threadIdx.x; i < elements; i += blockDim.x) to[i] = to_float(x[i]);
}

template <class T, class E, int kHeads, int kElements>
__global__ void attention_kernel(PassAttentionArgs<T, E> args, PassRows rows, std::int64_t max_parts) {
  follow_last_kernel();
  const AttentionArgs<T, E>& cache = args.cache;
  const std::int64_t H = cache.H;
  const AttentionTile tile = attention_tile<kHeads>(cache, rows, args.window);
  const PartRange parts = visible_parts(tile.first_key, tile.num_keys);
  if (blockIdx.y >= parts.count) return;
  float* scores = block_shared<float>();                // [kPartKeys][kHeads]
  float* q = scores + kPartKeys * kHeads;               // [kWidth][kHeads]
  float* sums = q + kWidth<kElements> * kHeads;         // [warps][kHeads][H]
  float* maxima = sums + kAttentionWarps * kHeads * H;  // [kHeads]
  float* totals = maxima + kHeads;                      // [kHeads]
  float* value_scales = totals + kHeads;                // [kPartKeys] where values have scales

  // The part's blocks: lane l knows where block l lies.
  const std::int64_t part_key = (parts.first + blockIdx.y) * kKeysPerPart;
  const KeyRange keys = {
      tile.first_key > part_key ? static_cast<int>(tile.first_key - part_key) : 0,
      tile.num_keys - part_key < kPartKeys ? static_cast<int>(tile.num_keys - part_key) : kPartKeys};
  std::int32_t lane_block = 0;
  if (lane_id() < kPartBlocks && lane_id() * kKeys < keys.end)
    lane_block = rows.tables[tile.t][part_key / kBlockTokens + lane_id()];
  // Calls fn(offset, first key in the part) for the blocks of this warp that hold a visible key.
  const auto for_blocks = [&](const auto& fn) {
    for (int b = warp_id(); b < kPartBlocks; b += kAttentionWarps) {
      const std::int32_t block = __shfl_sync(kAllLanes, lane_block, b);
      const int base = b * kKeys;
      if (base >= keys.end || base + kKeys <= keys.begin) continue;
      fn(head_offset<E>(block, cache.block_stride, tile.g, H), base);
    }
  };
  for_blocks([&](std::int64_t at, int) {
    prefetch_head(cache.k + at, static_cast<int>(H));
    prefetch_head(cache.v + at, static_cast<int>(H));
  });
  const T* heads = args.q + matrix_offset(tile.t, tile.first_head * H, args.q_stride);
  for (int i = static_cast<int>(threadIdx.x); i < kWidth<kElements> * kHeads; i += kAttentionWarps * kWarp) {
    const int h = i % kWidth<kElements>, n = i / kWidth<kElements>;
    q[h * kHeads + n] = h < H && n < tile.heads ? to_float(heads[n * H + h]) * kHalfUnit<E> : 0;
  }
  __syncthreads();
  for_blocks([&](std::int64_t at, int base) {
    if constexpr (kScaled<E>)
      if (lane_id() < kKeys)
        value_scales[base + lane_id()] = slot_scale(cache.v + at, static_cast<int>(H)) * kHalfUnit<E>;
    score_block<kHeads, kElements>(cache, cache.k + at, q, scores + base * kHeads);
  });
  __syncthreads();
  weigh_part<kHeads, kScaled<E>>(scores, value_scales, keys, tile.heads, maxima, totals);
  __syncthreads();
  ValueSums<kHeads, kElements, E> values = {};
  for_blocks([&](std::int64_t at, int base) {
    add_values(values, cache.v + at, static_cast<int>(H), scores + base * kHeads,
               KeyRange{keys.begin - base, keys.end - base});
  });
  store_values(values, static_cast<int>(H), sums + warp_id() * kHeads * H);
  __syncthreads();

  for (int n = 0; n < tile.heads; ++n) {
    const std::int64_t head = tile.first_head + n;
    const bool alone = parts.count == 1;
    float* partial =
        alone ? nullptr : args.workspace + part_offset(tile.place, head, blockIdx.y, cache.N, max_parts, H);
    for (int h = static_cast<int>(threadIdx.x); h < H; h += kAttentionWarps * kWarp) {
      float sum = 0;
#pragma unroll
      for (int warp = 0; warp < kAttentionWarps; ++warp) sum += sums[(warp * kHeads + n) * H + h];
      if (alone)
        args.out[matrix_offset(tile.t, head * H + h, cache.N * H)] = from_float<T>(sum / totals[n]);
      else
        partial[h] = sum;
    }
    if (threadIdx.x != 0) continue;
    if (!alone) {
      partial[H] = maxima[n];
      partial[H + 1] = totals[n];
    } else if (args.lse) {
      args.lse[matrix_offset(tile.t, head, cache.N)] = maxima[n] + logf(totals[n]);
    }
  }
}

/// The compiler reads the weights of so many parts at once, also beyond the last one.
constexpr int kPartsAtOnce = 8;

/// Sums the parts of one (row, head), in order.
template <class T, class E>
__global__ void attention_parts_kernel(PassAttentionArgs<T, E> args, PassRows rows, std::int64_t max_parts) {
  follow_last_kernel();
  const std::int64_t N = args.cache.N, H = args.cache.H, n = blockIdx.x % N;
  const std::int64_t t = single_row(rows, blockIdx.x / N);
  const std::int64_t position = rows.positions[t];
  const PartRange parts = visible_parts(first_visible_key(position, args.window), position + 1);
  if (parts.count == 1) return;
  const float* partial = args.workspace + part_offset(blockIdx.x / N, n, 0, N, max_parts, H);
  float* weights = block_shared<float>();  // [parts], to a multiple of kPartsAtOnce
  // Every warp for itself: the maximum, then the weights and their total.
  float maximum = -INFINITY, total = 0;
  for (std::int64_t part = lane_id(); part < parts.count; part += kWarp)
    maximum = fmaxf(maximum, partial[part * (H + 2) + H]);
  maximum = warp_max(maximum);
  for (std::int64_t part = lane_id(); part < parts.count; part += kWarp) {
    const float weight = expf(partial[part * (H + 2) + H] - maximum);
    total += weight * partial[part * (H + 2) + H + 1];
    if (warp_id() == 0) weights[part] = weight;
  }
  total = warp_sum(total);
  __syncthreads();
  for (std::int64_t h = threadIdx.x; h < H; h += blockDim.x) {
    float sum = 0;
#pragma unroll kPartsAtOnce
    for (std::int64_t part = 0; part < parts.count; ++part)
      sum += weights[part] * partial[part * (H + 2) + h];
    args.out[matrix_offset(t, n * H + h, N * H)] = from_float<T>(sum / total);
    if (args.lse && h == 0) args.lse[matrix_offset(t, n, N)] = maximum + logf(total);
  }
}

template <class E>
std::size_t attention_shared_bytes(int heads, int width, std::int64_t H) {
  const std::int64_t floats =
      heads * (kPartKeys + width + H * kAttentionWarps + 2) + (kScaled<E> ? kPartKeys : 0);
  return static_cast<std::size_t>(floats) * sizeof(float);
}

template <int kHeads, int kElements, class T, class E>
void launch_attention(const PassAttentionArgs<T, E>& args, const PassRows& rows, void* queue) {
  const std::int64_t tiles = args.cache.G * ceil_div(args.cache.N / args.cache.G, kHeads);
  const std::int64_t parts = max_attention_parts(rows.max_keys, args.window);
  launch_early("attention", attention_kernel<T, E, kHeads, kElements>,
               dim3(static_cast<unsigned>(num_single_rows(rows) * tiles), static_cast<unsigned>(parts)),
               kAttentionWarps * kWarp, attention_shared_bytes<E>(kHeads, kWidth<kElements>, args.cache.H),
               queue, args, rows, parts);
  if (parts > 1)
    launch_early("attention_parts", attention_parts_kernel<T, E>,
                 dim3(static_cast<unsigned>(num_single_rows(rows) * args.cache.N)), 128,
                 static_cast<std::size_t>(ceil_div(parts, kPartsAtOnce) * kPartsAtOnce) * sizeof(float),
                 queue, args, rows, parts);
}

template <class T, class E>
void attention_of_rows(const PassAttentionArgs<T, E>& args, const PassRows& rows, void* queue) {
  const std::int64_t H = args.cache.H, group = args.cache.N / args.cache.G;
  RLHF_CHECK(reinterpret_cast<std::uintptr_t>(args.cache.k) % 16 == 0 &&
                 reinterpret_cast<std::uintptr_t>(args.cache.v) % 16 == 0 &&
                 args.cache.block_stride * static_cast<std::int64_t>(sizeof(E)) % 16 == 0,
             "CUDA: blocks of K and V must start at multiples of 16 bytes");
  if (num_single_rows(rows) == 0) return;
  const bool one = group == 1, narrow = H <= 64, middle = H <= 128;
  if (narrow)
    one ? launch_attention<1, 2>(args, rows, queue) : launch_attention<4, 2>(args, rows, queue);
  else if (middle)
    one ? launch_attention<1, 4>(args, rows, queue) : launch_attention<4, 4>(args, rows, queue);
  else
    one ? launch_attention<1, 8>(args, rows, queue) : launch_attention<4, 8>(args, rows, queue);
}

template <class T, class E>
void attention(const PassAttentionArgs<T, E>& args, const PassRows& rows, void* queue) {
  check_head_width(args.cache.H);
  if constexpr (sizeof(T) == sizeof(Bfloat16)) {
    if (rows.num_tiles > 0 && takes_tiles(args.cache.H)) {
      // The workspace is for the other rows only: there is no way back to one by one.
      RLHF_CHECK(
          args.q_stride % 2 == 0 && aligned(args.q, 4) && aligned(args.out, 4) &&
              tensor_cores_take(args.cache),
          "CUDA: q and out must start at multiples of 4 bytes, blocks of K and V must start at multiples "
          "of 16 bytes");
      launch_attention_tiles(args, rows, queue);
      return attention_of_rows(args, rows, queue);
    }
  }
  attention_of_rows(args, without_tiles(rows), queue);
}

template <class T>
void fill_attention_fp8(DeviceKernels<T>& table) {
  table.attention_fp8 = attention<T, Float8>;
}

}  // namespace rlhf::kernels::RLHF_GPU

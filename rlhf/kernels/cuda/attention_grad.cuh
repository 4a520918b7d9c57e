#pragma once
// Backward of attention.cuh, without atomics: dQ per row, as forward goes; dK and dV per block of keys, over
// the rows that see it (BlockUses), in order. Both recompute the scores from the kept log-sum-exp. Bound:
// arithmetic without tensor cores; attention_tiles_grad.cuh has them.

#include "rlhf/kernels/cuda/attention.cuh"
#include "rlhf/kernels/cuda/attention_tiles_grad.cuh"

namespace rlhf::kernels::RLHF_GPU {

/// d score of the lane's key for each head, and its probability: p (dout . v - delta) scale, through the soft
/// cap.
template <int kHeads, class T>
__device__ inline void score_slopes(const AttentionArgs<T>& cache, const T* k, const T* v, const float* q,
                                    const float* dout, const float* lse, const float* delta, int heads,
                                    KeyRange keys, float (&p)[kHeads], float (&slopes)[kHeads]) {
  float scores[kHeads], dots[kHeads];
  key_scores<kHeads>(cache, k, q, heads, keys, scores);
  const int key = lane_id() % kKeys, side = lane_id() / kKeys;
  const bool visible = key >= keys.begin && key < keys.end;
#pragma unroll
  for (int n = 0; n < kHeads; ++n) dots[n] = 0;
  for (std::int64_t h = side; visible && h < cache.H; h += 2) {
    const float element = to_float(v[value_offset(key, h, cache.H)]);
#pragma unroll
    for (int n = 0; n < kHeads; ++n)
      if (n < heads) dots[n] += dout[n * cache.H + h] * element;
  }
  const float scale = static_cast<float>(cache.scale), cap = static_cast<float>(cache.softcap);
#pragma unroll
  for (int n = 0; n < kHeads; ++n) {
    const float dot = dots[n] + __shfl_xor_sync(kAllLanes, dots[n], kKeys);
    p[n] = 0;
    slopes[n] = 0;
    if (!visible || n >= heads) continue;
    p[n] = expf(scores[n] - lse[n]);
    slopes[n] = p[n] * (dot - delta[n]) * scale;
    if (cap > 0) slopes[n] *= 1 - (scores[n] / cap) * (scores[n] / cap);
  }
}

template <class T, int kHeads, int kElements>
__global__ void attention_dq_kernel(PassAttentionGradArgs<T> args, PassRows rows) {
  const AttentionArgs<T>& cache = args.cache;
  const std::int64_t H = cache.H;
  const AttentionTile tile = attention_tile<kHeads>(cache, rows, args.window);
  float* q = block_shared<float>();  // [kHeads][H]
  float* dout = q + kHeads * H;      // [kHeads][H]
  float* lse = dout + kHeads * H;    // [kHeads]
  float* delta = lse + kHeads;       // [kHeads]
  float* sums = delta + kHeads;      // [warps][kHeads][H]
  const std::int64_t row = matrix_offset(tile.t, tile.first_head * H, cache.N * H);
  load_heads(q, args.q + row, tile.heads * H);
  load_heads(dout, args.dout + row, tile.heads * H);
  for (int n = warp_id(); n < tile.heads; n += kAttentionWarps) {
    const float dot = head_delta(args.dout + row + n * H, args.out + row + n * H, H);
    if (lane_id() == 0) {
      delta[n] = dot;
      lse[n] = args.lse[matrix_offset(tile.t, tile.first_head + n, cache.N)];
    }
  }
  __syncthreads();
  float sum[kHeads][kElements] = {};
  const std::int64_t num_blocks = ceil_div(tile.num_keys, kBlockTokens);
  for (std::int64_t b = tile.first_key / kBlockTokens + warp_id(); b < num_blocks; b += kAttentionWarps) {
    const std::int64_t at = head_offset(rows.tables[tile.t][b], cache.block_stride, tile.g, H);
    const KeyRange keys = visible_keys(b, tile.first_key, tile.num_keys);
    float p[kHeads], slopes[kHeads];
    score_slopes<kHeads>(cache, cache.k + at, cache.v + at, q, dout, lse, delta, tile.heads, keys, p, slopes);
    for (int key = keys.begin; key < keys.end; ++key) {
      float element[kElements];
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const std::int64_t h = lane_id() + kWarp * e;
        element[e] = h < H ? to_float(cache.k[at + key_offset(key, h)]) : 0;
      }
#pragma unroll
      for (int n = 0; n < kHeads; ++n) {
        const float slope = __shfl_sync(kAllLanes, slopes[n], key);
#pragma unroll
        for (int e = 0; e < kElements; ++e) sum[n][e] += slope * element[e];
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kHeads; ++n)
#pragma unroll
    for (int e = 0; e < kElements; ++e)
      if (lane_id() + kWarp * e < H) sums[(warp_id() * kHeads + n) * H + lane_id() + kWarp * e] = sum[n][e];
  __syncthreads();
  for (std::int64_t i = threadIdx.x; i < tile.heads * H; i += blockDim.x) {
    float total = 0;
    for (int warp = 0; warp < kAttentionWarps; ++warp) total += sums[warp * kHeads * H + i];
    args.dq[matrix_offset(tile.t, tile.first_head * H + i, args.dq_stride)] = from_float<T>(total);
  }
}

constexpr int kPairsPerTile = 8;  // (row, query head) pairs that a block of threads works on at once

/// dK and dV of one block of keys of one kv head. Warps compute probabilities and slopes of a tile of pairs;
/// then every thread adds the tile to its elements of dK and dV, which it holds in registers.
template <class T, int kElements>
__global__ void attention_dkv_kernel(PassAttentionGradArgs<T> args, PassRows rows) {
  const AttentionArgs<T>& cache = args.cache;
  const std::int64_t H = cache.H, group = cache.N / cache.G, block = blockIdx.x, g = blockIdx.y;
  const std::int64_t at = head_offset(block, cache.block_stride, g, H);
  const std::int64_t index = args.uses.first_keys[block] / kBlockTokens;
  float* q = block_shared<float>();           // [pairs][H]
  float* dout = q + kPairsPerTile * H;        // [pairs][H]
  float* weights = dout + kPairsPerTile * H;  // [pairs][16]
  float* slopes = weights + kPairsPerTile * kKeys;
  float dk[kElements] = {}, dv[kElements] = {};
  for (std::int64_t r = args.uses.offsets[block]; r < args.uses.offsets[block + 1]; ++r) {
    const std::int64_t first_row = args.uses.ranges[2 * r];
    const std::int64_t pairs = (args.uses.ranges[2 * r + 1] - first_row) * group;
    for (std::int64_t begin = 0; begin < pairs; begin += kPairsPerTile) {
      const int count = pairs - begin < kPairsPerTile ? static_cast<int>(pairs - begin) : kPairsPerTile;
      for (int i = warp_id(); i < count; i += num_warps()) {
        const std::int64_t t = first_row + (begin + i) / group, n = g * group + (begin + i) % group;
        const std::int64_t head = matrix_offset(t, n * H, cache.N * H), position = rows.positions[t];
        for (std::int64_t h = lane_id(); h < H; h += kWarp) {
          q[i * H + h] = to_float(args.q[head + h]);
          dout[i * H + h] = to_float(args.dout[head + h]);
        }
        __syncwarp();
        const float delta[1] = {head_delta(args.dout + head, args.out + head, H)};
        const float lse[1] = {args.lse[matrix_offset(t, n, cache.N)]};
        float p[1], slope[1];
        score_slopes<1>(cache, cache.k + at, cache.v + at, q + i * H, dout + i * H, lse, delta, 1,
                        visible_keys(index, first_visible_key(position, args.window), position + 1), p,
                        slope);
        if (lane_id() < kKeys) {
          weights[i * kKeys + lane_id()] = p[0];
          slopes[i * kKeys + lane_id()] = slope[0];
        }
      }
      __syncthreads();
      for (int i = 0; i < count; ++i)
#pragma unroll
        for (int e = 0; e < kElements; ++e) {
          const std::int64_t element = threadIdx.x + e * static_cast<std::int64_t>(blockDim.x);
          const std::int64_t h = element / kKeys, key = element % kKeys;
          if (h >= H) continue;
          dk[e] += slopes[i * kKeys + key] * q[i * H + h];
          dv[e] += weights[i * kKeys + key] * dout[i * H + h];
        }
      __syncthreads();
    }
  }
#pragma unroll
  for (int e = 0; e < kElements; ++e) {
    const std::int64_t element = threadIdx.x + e * static_cast<std::int64_t>(blockDim.x);
    const std::int64_t h = element / kKeys, key = element % kKeys;
    if (h >= H) continue;
    args.dk[at + key_offset(key, h)] = dk[e];
    args.dv[at + value_offset(key, h, H)] = dv[e];
  }
}

template <class T, int kHeads, int kElements>
void launch_attention_dq(const PassAttentionGradArgs<T>& args, const PassRows& rows, void* queue) {
  const std::int64_t H = args.cache.H, tiles = args.cache.G * ceil_div(args.cache.N / args.cache.G, kHeads);
  const std::int64_t floats = kHeads * H * (2 + kAttentionWarps) + 2 * kHeads;
  launch("attention_dq", attention_dq_kernel<T, kHeads, kElements>,
         dim3(static_cast<unsigned>(num_single_rows(rows) * tiles)), kAttentionWarps * kWarp,
         static_cast<std::size_t>(floats) * sizeof(float), queue, args, rows);
}

template <class T, int kElements>
void launch_attention_dkv(const PassAttentionGradArgs<T>& args, const PassRows& rows, void* queue) {
  // 16 H elements over 128 threads: 4 times the elements per lane of a head.
  launch("attention_dkv", attention_dkv_kernel<T, 4 * kElements>,
         dim3(static_cast<unsigned>(args.uses.num_blocks), static_cast<unsigned>(args.cache.G)),
         kAttentionWarps * kWarp,
         static_cast<std::size_t>(kPairsPerTile * 2 * (args.cache.H + kKeys)) * sizeof(float), queue, args,
         rows);
}

template <class T>
void attention_dq_of_rows(const PassAttentionGradArgs<T>& args, const PassRows& rows, void* queue) {
  if (args.cache.H <= 64)
    launch_attention_dq<T, 4, 2>(args, rows, queue);
  else if (args.cache.H <= 128)
    launch_attention_dq<T, 4, 4>(args, rows, queue);
  else
    launch_attention_dq<T, 4, 8>(args, rows, queue);
}

template <class T>
void attention_grad(const PassAttentionGradArgs<T>& args, const PassRows& rows, void* queue) {
  check_head_width(args.cache.H);
  if constexpr (sizeof(T) == sizeof(Bfloat16)) {
    if (tensor_cores_take(args)) {
      launch_attention_tiles_grad(args, rows, queue);
      return attention_dq_of_rows(args, rows, queue);
    }
  }
  attention_dq_of_rows(args, without_tiles(rows), queue);
  if (args.cache.H <= 64)
    launch_attention_dkv<T, 2>(args, rows, queue);
  else if (args.cache.H <= 128)
    launch_attention_dkv<T, 4>(args, rows, queue);
  else
    launch_attention_dkv<T, 8>(args, rows, queue);
}

template <class T>
void fill_attention(DeviceKernels<T>& table) {
  table.attention = attention<T, T>;
  table.attention_grad = attention_grad<T>;
  fill_attention_fp8(table);
}

}  // namespace rlhf::kernels::RLHF_GPU

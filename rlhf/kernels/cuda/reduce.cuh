#pragma once
// Sums and maxima over warps and blocks. Every lane gets the result, with the same bits.

#include <cmath>

#include "rlhf/kernels/cuda/launch.cuh"

namespace rlhf::kernels::RLHF_GPU {

constexpr unsigned kAllLanes = 0xFFFFFFFFU;
constexpr int kWarp = 32;

__device__ inline int lane_id() {
  return static_cast<int>(threadIdx.x) % kWarp;
}
__device__ inline int warp_id() {
  return static_cast<int>(threadIdx.x) / kWarp;
}
__device__ inline int num_warps() {
  return static_cast<int>(blockDim.x) / kWarp;
}

template <class V>
__device__ inline V warp_sum(V value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

__device__ inline float warp_max(float value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, distance));
  return value;
}

/// Sums each of the first kCount values over the lanes that differ in the bits kHigh, kHigh / 2 .. kLow of
/// their number, and spreads the sums over these lanes: a lane is left with kSumsLeft of them, from
/// values[0] on. @return the number of the first. Takes a fraction of the shuffles that summing one by one
/// takes.
template <int kCount, int kHigh, int kLow, int kSize>
__device__ inline int spread_sums(float (&values)[kSize]) {
  if constexpr (kHigh < kLow) {
    return 0;
  } else if constexpr (kCount == 1) {
    values[0] += __shfl_xor_sync(kAllLanes, values[0], kHigh);
    return spread_sums<1, kHigh / 2, kLow>(values);
  } else {
    constexpr int kHalf = kCount / 2;
    const bool upper = (lane_id() & kHigh) != 0;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float mine = upper ? values[i + kHalf] : values[i], other = upper ? values[i] : values[i + kHalf];
      values[i] = mine + __shfl_xor_sync(kAllLanes, other, kHigh);
    }
    return (upper ? kHalf : 0) + spread_sums<kHalf, kHigh / 2, kLow>(values);
  }
}
template <int kCount, int kHigh, int kLow>
constexpr int kSumsLeft = kHigh < kLow || kCount == 1 ? kCount : kSumsLeft<kCount / 2, kHigh / 2, kLow>;
template <int kCount, int kLow>
constexpr int kSumsLeft<kCount, 0, kLow> = kCount;

/// Sum over the block; `scratch` holds one V per warp. Contains two barriers, so scratch may be used again at
/// once.
template <class V>
__device__ inline V block_sum(V value, V* scratch) {
  value = warp_sum(value);
  if (lane_id() == 0) scratch[warp_id()] = value;
  __syncthreads();
  value = warp_sum(lane_id() < num_warps() ? scratch[lane_id()] : V(0));
  __syncthreads();
  return value;
}

}  // namespace rlhf::kernels::RLHF_GPU

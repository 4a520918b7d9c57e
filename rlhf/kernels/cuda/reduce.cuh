#pragma once
// Sums and maxima over warps and blocks. Every lane gets the result, with the same bits.

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

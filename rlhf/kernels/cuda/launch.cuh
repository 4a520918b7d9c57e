#pragma once
// How the kernels of this folder start, the memory that the threads of a block share, and the few things that
// are not plain C++. Their sources use a small part of CUDA: one-dimensional blocks, barriers, shuffles over
// whole warps, dynamic shared memory, accesses of 16 bytes, no atomics. So the same sources also run in tests
// on a machine without a GPU, block by block: tests/cuda/emulator.h then takes this file's place.

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "rlhf/core/error.h"

namespace rlhf::kernels::RLHF_GPU {

/// The block's dynamic shared memory as an array of V. All of a kernel's shared data is one array.
template <class V>
__device__ inline V* block_shared() {
  extern __shared__ __align__(16) unsigned char rlhf_shared_memory[];
  return reinterpret_cast<V*>(rlhf_shared_memory);
}

/// One access of 16 bytes; the address is a multiple of 16.
__device__ inline void load_16_bytes(std::uint32_t (&to)[4], const void* from) {
  const uint4 words = *static_cast<const uint4*>(from);
  to[0] = words.x;
  to[1] = words.y;
  to[2] = words.z;
  to[3] = words.w;
}
__device__ inline void store_16_bytes(void* to, const std::uint32_t (&from)[4]) {
  *static_cast<uint4*>(to) = make_uint4(from[0], from[1], from[2], from[3]);
}

/// Asks for a line of 128 bytes of global memory that will be read.
__device__ inline void prefetch_line(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

/// Two floats rounded to bfloat16, `low` in the lower half: what from_float gives, in one instruction.
__device__ inline std::uint32_t round_pair(float low, float high) {
  std::uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

/// a / b to 2 units in the last place; 0 for a huge b.
__device__ inline float quick_quotient(float a, float b) {
  return __fdividef(a, b);
}

/// Queues a kernel; at most 48 KiB of shared memory. @throws Error when the launch is refused. Faults inside
/// a kernel show up at the next synchronisation.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, std::size_t shared_bytes,
            void* queue, const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0) return;
  kernel<<<grid, static_cast<unsigned>(threads), shared_bytes, static_cast<cudaStream_t>(queue)>>>(
      arguments...);
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess)
    fail<Error>("CUDA kernel ", name, " with ", grid.x, " x ", grid.y, " blocks of ", threads,
                " threads and ", shared_bytes, " bytes of shared memory: ", cudaGetErrorString(status));
}

}  // namespace rlhf::kernels::RLHF_GPU

#endif

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

/// What a kernel queued by launch_early does, in every thread, before it reads what the kernel before it in
/// the queue writes and before it writes anything: waits until that one has ended. From then on the next one
/// may begin early. Before it, only what no kernel of the same step writes (weights) may be read.
__device__ inline void follow_last_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

/// Whether the current GPU can start a kernel early: from compute capability 9.0 on.
inline bool starts_early() {
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  return cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         major >= 9;
}

template <class... Parameters, class... Arguments>
void launch_kernel(bool early, const char* name, void (*kernel)(Parameters...), dim3 grid, int threads,
                   std::size_t shared_bytes, void* queue, const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0) return;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(queue);
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  if (status != cudaSuccess)
    fail<Error>("CUDA kernel ", name, " with ", grid.x, " x ", grid.y, " blocks of ", threads,
                " threads and ", shared_bytes, " bytes of shared memory: ", cudaGetErrorString(status));
}

/// Queues a kernel; at most 48 KiB of shared memory. @throws Error when the launch is refused. Faults inside
/// a kernel show up at the next synchronisation.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, std::size_t shared_bytes,
            void* queue, const Arguments&... arguments) {
  launch_kernel(false, name, kernel, grid, threads, shared_bytes, queue, arguments...);
}

/// The same for a kernel that calls follow_last_kernel: its blocks start, and read weights, while the kernel
/// before it ends. For the chain of short kernels that a decode step is.
template <class... Parameters, class... Arguments>
void launch_early(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads,
                  std::size_t shared_bytes, void* queue, const Arguments&... arguments) {
  launch_kernel(starts_early(), name, kernel, grid, threads, shared_bytes, queue, arguments...);
}

}  // namespace rlhf::kernels::RLHF_GPU

#endif

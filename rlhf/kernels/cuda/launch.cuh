#pragma once
// How the kernels of this folder start, and the memory that the threads of a block share. Their sources use a
// small part of CUDA: one-dimensional blocks, barriers, shuffles over whole warps, dynamic shared memory, no
// atomics. So the same sources also run in tests on a machine without a GPU, block by block:
// tests/cuda/emulator.h then takes this file's place.

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#include <cstddef>

#include "rlhf/core/error.h"

namespace rlhf::kernels::RLHF_GPU {

/// The block's dynamic shared memory as an array of V. All of a kernel's shared data is one array.
template <class V>
__device__ inline V* block_shared() {
  extern __shared__ __align__(16) unsigned char rlhf_shared_memory[];
  return reinterpret_cast<V*>(rlhf_shared_memory);
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

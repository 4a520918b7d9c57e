#pragma once

#include <cstdint>
#include <string>

#include "rlhf/kernels/device_kernels.h"
#include "rlhf/tensor/device_memory.h"

namespace rlhf {

class DeviceCollective;

/// A device beside the CPU that models run on: weights, activations and K/V in bfloat16; sums, master
/// weights, gradients and moments in float. A Compute that carries one makes engines, passes and optimizers
/// run there. Everything is queued in one order; the memory must outlive all that uses it.
struct Accelerator {
  const kernels::DeviceKernels<Bfloat16>* kernels = nullptr;
  DeviceMemory* memory = nullptr;
  std::uint64_t bytes = 0;            ///< of its memory; percentages of a budget refer to it
  std::string name;                   ///< in words
  double flops_per_s = 0;             ///< its best rate of products; 0 = measured when it is asked for
  DeviceCollective* ranks = nullptr;  ///< with the devices of a run's other processes; null = one process
};

}  // namespace rlhf

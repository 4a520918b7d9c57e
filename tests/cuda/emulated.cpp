// The kernels of rlhf/kernels/cuda as a device of its own, on the CPU.
#define RLHF_GPU emulated
#include "tests/cuda/emulator.h"
// The emulator defines what the kernels' sources use of CUDA, so it comes first.
#include "rlhf/kernels/cuda/attention_grad.cuh"
#include "rlhf/kernels/cuda/row_table.cuh"
#include "tests/cuda/devices.h"

namespace rlhf {

void set_emulator_order(int order) {
  emulator::order = static_cast<emulator::Order>(order);
}

std::vector<std::function<void()>>*& emulator_recorder() {
  return emulator::recorder;
}

void set_emulator_hooks(void (*before)(void*), void (*after)(void*), void* context) {
  emulator::hooks = {before, after, context};
}

template <class T>
const kernels::DeviceKernels<T>& emulated_kernels() {
  static const kernels::DeviceKernels<T> kernels = [] {
    kernels::DeviceKernels<T> table{};
    table.name = "emulated";
    kernels::emulated::fill_rows(table);
    kernels::emulated::fill_attention(table);
    return table;
  }();
  return kernels;
}
template const kernels::DeviceKernels<float>& emulated_kernels<float>();
template const kernels::DeviceKernels<Bfloat16>& emulated_kernels<Bfloat16>();

}  // namespace rlhf

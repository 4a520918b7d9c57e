#include "rlhf/kernels/cpu/packed.h"

#define RLHF_STRINGIFY_(name) #name
#define RLHF_STRINGIFY(name) RLHF_STRINGIFY_(name)

namespace rlhf::kernels::RLHF_ISA {

const PackedKernels& packed_table() {
  static const PackedKernels kernels = {
      RLHF_STRINGIFY(RLHF_ISA), linear_bf16, linear_int8, quantise_row, pack_bf16, pack_int8};
  return kernels;
}

}  // namespace rlhf::kernels::RLHF_ISA

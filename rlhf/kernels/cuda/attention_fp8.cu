#define RLHF_GPU cuda
#include "rlhf/kernels/cuda/attention.cuh"

namespace rlhf::kernels::cuda {

template void fill_attention_fp8<float>(DeviceKernels<float>&);
template void fill_attention_fp8<Bfloat16>(DeviceKernels<Bfloat16>&);

}  // namespace rlhf::kernels::cuda

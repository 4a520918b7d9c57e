#define RLHF_GPU cuda
#include "rlhf/kernels/cuda/attention_grad.cuh"

namespace rlhf::kernels::cuda {

// In attention_fp8.cu.
extern template void fill_attention_fp8<float>(DeviceKernels<float>&);
extern template void fill_attention_fp8<Bfloat16>(DeviceKernels<Bfloat16>&);

template void fill_attention<float>(DeviceKernels<float>&);
template void fill_attention<Bfloat16>(DeviceKernels<Bfloat16>&);

}  // namespace rlhf::kernels::cuda

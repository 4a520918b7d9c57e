#define RLHF_GPU cuda
#include "rlhf/kernels/cuda/attention_grad.cuh"

namespace rlhf::kernels::cuda {

template void fill_attention<float>(DeviceKernels<float>&);
template void fill_attention<Bfloat16>(DeviceKernels<Bfloat16>&);

}  // namespace rlhf::kernels::cuda

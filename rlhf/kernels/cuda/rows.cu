#define RLHF_GPU cuda
#include "rlhf/kernels/cuda/row_table.cuh"

namespace rlhf::kernels::cuda {

template void fill_rows<float>(DeviceKernels<float>&);
template void fill_rows<Bfloat16>(DeviceKernels<Bfloat16>&);

}  // namespace rlhf::kernels::cuda

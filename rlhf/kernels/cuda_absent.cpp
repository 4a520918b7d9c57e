// Takes the place of rlhf/kernels/cuda in a build without CUDA.
#include "rlhf/core/error.h"
#include "rlhf/kernels/cuda_device.h"

namespace rlhf {
namespace {

constexpr const char* kAbsent = "this program was built without CUDA (no nvcc was found, or RLHF_CUDA=OFF)";

}  // namespace

CudaStatus cuda_status(int) {
  return {false, kAbsent};
}

std::vector<std::string> cuda_gpu_names() {
  return {};
}

bool cuda_queue_is_done(void*) {
  fail<Error>("device: cuda: ", kAbsent);
}

std::unique_ptr<CudaDevice> CudaDevice::open(int) {
  fail<Error>("device: cuda: ", kAbsent);
}

template <class T>
const kernels::DeviceKernels<T>& cuda_device_kernels(CudaProducts) {
  fail<Error>("device: cuda: ", kAbsent);
}
template const kernels::DeviceKernels<float>& cuda_device_kernels<float>(CudaProducts);
template const kernels::DeviceKernels<Bfloat16>& cuda_device_kernels<Bfloat16>(CudaProducts);

const std::string& cuda_library_problem() {
  static const std::string problem = kAbsent;
  return problem;
}

}  // namespace rlhf

#include "rlhf/kernels/open_device.h"

namespace rlhf {

OpenDevice::OpenDevice(Device wanted, int gpu) {
  if (wanted == Device::kCpu) return;
  const CudaStatus status = cuda_status(gpu);
  if (!status.usable && wanted == Device::kAuto) {
    text_ = "cpu (" + status.text + ")";
    return;
  }
  cuda_ = CudaDevice::open(gpu);
  accelerator_ = {&cuda_device_kernels<Bfloat16>(), cuda_.get(), cuda_->total_bytes(), status.text};
  text_ = "cuda (" + status.text + ")";
  if (const std::string& problem = cuda_library_problem(); !problem.empty())
    text_ += ", matrix products without tensor cores: " + problem;
}

}  // namespace rlhf

// What can be asked of GPUs without opening one.
#include <cuda_runtime.h>

#include <iomanip>
#include <sstream>

#include "rlhf/core/error.h"
#include "rlhf/kernels/cuda_device.h"

namespace rlhf {
namespace {

std::string text_of(const cudaUUID_t& uuid) {
  std::ostringstream text;
  for (const char byte : uuid.bytes)
    text << std::hex << std::setw(2) << std::setfill('0')
         << static_cast<int>(static_cast<unsigned char>(byte));
  return text.str();
}

}  // namespace

std::vector<std::string> cuda_gpu_names() {
  std::vector<std::string> names;
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) return names;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties{};
    const bool usable = cuda_status(i).usable && cudaGetDeviceProperties(&properties, i) == cudaSuccess;
    names.push_back(usable ? text_of(properties.uuid) : "");
  }
  return names;
}

bool cuda_queue_is_done(void* queue) {
  const cudaError_t status = cudaStreamQuery(static_cast<cudaStream_t>(queue));
  if (status != cudaSuccess && status != cudaErrorNotReady)
    fail<Error>("CUDA: looking whether kernels are done: ", cudaGetErrorString(status), " (",
                cudaGetErrorName(status), ")");
  return status == cudaSuccess;
}

}  // namespace rlhf

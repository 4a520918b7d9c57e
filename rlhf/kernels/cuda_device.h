#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "rlhf/kernels/device_kernels.h"
#include "rlhf/tensor/device_memory.h"

namespace rlhf {

/// Whether a GPU can be used here, and why not.
struct CudaStatus {
  bool usable = false;
  std::string text;  ///< the GPU in words; or what is missing: built without CUDA, no driver, driver too old,
                     ///< no GPU, too old a GPU
};

/// Looks for GPU number `index`. Never throws; every error of the driver counts as "not usable".
CudaStatus cuda_status(int index = 0);

/// UUIDs, in hexadecimal digits, of the GPUs that this process sees, by number; empty for one that cannot be
/// used. Never throws.
std::vector<std::string> cuda_gpu_names();

/// Whether everything that was queued in a CudaDevice's queue is done. @throws Error naming a fault
bool cuda_queue_is_done(void* queue);

/// One GPU: memory, and the stream that kernels and copies are queued in, in the order of the calls from any
/// thread. A recording is a CUDA graph. A
/// fault of the GPU is sticky: every later call throws an Error with the first message.
class CudaDevice : public DeviceMemory {
 public:
  /// @throws Error with cuda_status()'s text when the GPU cannot be used.
  static std::unique_ptr<CudaDevice> open(int index = 0);
  /// Bytes that are free on the GPU, and all of them.
  virtual std::size_t free_bytes() const = 0;
  virtual std::size_t total_bytes() const = 0;
};

/// Who multiplies matrices: cuBLASLt where it is found and has an algorithm for the case, else this library's
/// kernel; or always this library's kernel, which sums every output in one order, whatever the batch.
enum class CudaProducts { kLibrary, kOwn };

/// The GPU's table; T is float or Bfloat16. @throws Error when built without CUDA.
template <class T>
const kernels::DeviceKernels<T>& cuda_device_kernels(CudaProducts products = CudaProducts::kLibrary);

/// Why cuBLASLt cannot be used; empty when it can. Opens it.
const std::string& cuda_library_problem();

}  // namespace rlhf

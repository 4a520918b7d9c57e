#pragma once

#include <memory>
#include <optional>
#include <string>

#include "rlhf/kernels/accelerator.h"
#include "rlhf/kernels/cuda_device.h"

namespace rlhf {

/// Where models run. AUTO: a GPU where one can be used, else the CPU.
enum class Device { kAuto, kCpu, kCuda };

/// The device that was asked for, opened.
class OpenDevice {
 public:
  /// @param gpu number of the GPU that is meant
  /// @throws Error for kCuda, with what is missing, where it cannot be used.
  explicit OpenDevice(Device wanted, int gpu = 0);

  /// Null on the CPU.
  const Accelerator* accelerator() const { return accelerator_ ? &*accelerator_ : nullptr; }
  /// Such as "cuda (NVIDIA H100 ...)" or "cpu (no NVIDIA driver was found ...)".
  const std::string& text() const { return text_; }

 private:
  std::unique_ptr<CudaDevice> cuda_;
  std::optional<Accelerator> accelerator_;
  std::string text_ = "cpu";
};

}  // namespace rlhf

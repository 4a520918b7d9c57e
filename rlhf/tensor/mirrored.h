#pragma once

#include <cstddef>
#include <span>

#include "rlhf/tensor/buffer.h"
#include "rlhf/tensor/device_memory.h"

namespace rlhf {

/// An array of zeros that lives on the host until a device asks for it. Whoever asks may write, and gets what
/// the other side has written. Used by one thread at a time.
template <class T>
class Mirrored {
 public:
  explicit Mirrored(std::size_t size) : host_(size) {}

  std::span<T> host() {
    if (newest_ == Side::kDevice) memory_->download(host_.data(), device_.data(), host_.bytes());
    newest_ = Side::kHost;
    return {host_.data(), host_.size()};
  }
  T* device(DeviceMemory& memory) {
    if (device_.size() == 0) {
      memory_ = &memory;
      device_ = Buffer<T>(host_.size(), memory_);
    }
    if (newest_ == Side::kHost) memory_->upload(device_.data(), host_.data(), host_.bytes());
    newest_ = Side::kDevice;
    return device_.data();
  }
  std::size_t size() const { return host_.size(); }
  std::size_t bytes() const { return host_.bytes(); }

 private:
  enum class Side { kHost, kDevice };

  Buffer<T> host_, device_;
  DeviceMemory* memory_ = nullptr;
  Side newest_ = Side::kHost;
};

}  // namespace rlhf

#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

#include "rlhf/tensor/device_memory.h"

namespace rlhf {

/// An owned array of trivially copyable elements, aligned to 64 bytes, zero-filled. Move-only.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  /// @param memory null: the process's own. Else the elements are for that device's kernels only, and it must
  /// outlive the buffer.
  explicit Buffer(std::size_t size, DeviceMemory* memory = nullptr)
      : data_(nullptr, Free{memory}), size_(size) {
    if (size == 0) return;
    const std::size_t bytes = (size * sizeof(T) + 63) / 64 * 64;
    data_.reset(static_cast<T*>(memory ? memory->allocate(bytes) : std::aligned_alloc(64, bytes)));
    if (!data_) throw std::bad_alloc();
    if (memory)
      memory->zero(data_.get(), bytes);
    else
      std::memset(static_cast<void*>(data_.get()), 0, bytes);
  }
  Buffer(Buffer&& other) noexcept : data_(std::move(other.data_)), size_(std::exchange(other.size_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    data_ = std::move(other.data_);
    size_ = std::exchange(other.size_, 0);
    return *this;
  }

  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  std::size_t size() const { return size_; }
  std::size_t bytes() const { return size_ * sizeof(T); }
  T& operator[](std::size_t i) { return data_.get()[i]; }
  const T& operator[](std::size_t i) const { return data_.get()[i]; }
  T* begin() { return data(); }
  T* end() { return data() + size_; }

  /// Gives the pages (of the process's own memory) that lie wholly inside elements [begin, end) back to the
  /// system. The elements can be written again at any time; their contents are lost.
  void discard(std::size_t begin, std::size_t end) {
    if (data_.get_deleter().memory) return;
    const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
    const auto first = (reinterpret_cast<std::uintptr_t>(data() + begin) + page - 1) / page * page;
    const auto last = reinterpret_cast<std::uintptr_t>(data() + end) / page * page;
    // Private memory without a file: the next access finds zeros. A refusal only keeps the memory.
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
  }
  /// Grows to at least `size` elements; the contents are lost when it does.
  void reserve_discard(std::size_t size) {
    if (size > size_) {
      DeviceMemory* const memory = data_.get_deleter().memory;
      *this = Buffer(0, memory);
      *this = Buffer(size, memory);
    }
  }

 private:
  struct Free {
    DeviceMemory* memory = nullptr;
    void operator()(T* p) const {
      if (memory)
        memory->release(p);
      else
        std::free(p);
    }
  };
  std::unique_ptr<T, Free> data_;
  std::size_t size_ = 0;
};

}  // namespace rlhf

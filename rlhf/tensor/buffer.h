#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

#include "rlhf/tensor/device_memory.h"

namespace rlhf {

/// An owned array of trivially copyable elements, aligned to 64 bytes, zero-filled. Move-only. A large one
/// takes memory from the system as it is touched.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  /// @param memory null: the process's own. Else the elements are for that device's kernels only, and it must
  /// outlive the buffer.
  explicit Buffer(std::size_t size, DeviceMemory* memory = nullptr)
      : data_(nullptr, Free{memory, round_up(size * sizeof(T), kAlignment)}), size_(size) {
    if (size > 0) data_.reset(static_cast<T*>(data_.get_deleter().allocate()));
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

  /// Grows to at least `size` elements; the contents are lost when it does.
  void reserve_discard(std::size_t size) {
    if (size > size_) {
      DeviceMemory* const memory = data_.get_deleter().memory;
      *this = Buffer(0, memory);
      *this = Buffer(size, memory);
    }
  }

 private:
  static constexpr std::size_t kAlignment = 64;
  static constexpr std::size_t kLargePage = std::size_t{2} << 20;  // of x86-64
  static std::size_t round_up(std::size_t value, std::size_t unit) {
    return (value + unit - 1) / unit * unit;
  }

  // Where the elements come from and go to.
  struct Free {
    DeviceMemory* memory = nullptr;
    std::size_t bytes = 0;

    bool is_mapped() const { return !memory && bytes >= kLargePage; }
    void* allocate() const {
      if (is_mapped()) return map();
      void* const p = memory ? memory->allocate(bytes) : std::aligned_alloc(kAlignment, bytes);
      if (!p) throw std::bad_alloc();
      if (memory)
        memory->zero(p, bytes);
      else
        std::memset(p, 0, bytes);
      return p;
    }
    void operator()(T* p) const {
      if (is_mapped())
        munmap(p, round_up(bytes, kLargePage));
      else if (memory)
        memory->release(p);
      else
        std::free(p);
    }

   private:
    // Zeros by the system, from the first address that a large page can begin at.
    void* map() const {
      const std::size_t length = round_up(bytes, kLargePage);
      void* const got =
          mmap(nullptr, length + kLargePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (got == MAP_FAILED) throw std::bad_alloc();
      char* const begin = static_cast<char*>(got);
      char* const first = begin + (round_up(reinterpret_cast<std::uintptr_t>(got), kLargePage) -
                                   reinterpret_cast<std::uintptr_t>(got));
      if (first > begin) munmap(begin, static_cast<std::size_t>(first - begin));
      if (const auto behind = static_cast<std::size_t>(begin + kLargePage - first); behind > 0)
        munmap(first + length, behind);
      // Where the system refuses, the pages are small.
      madvise(first, bytes, MADV_HUGEPAGE);
      return first;
    }
  };
  std::unique_ptr<T, Free> data_;
  std::size_t size_ = 0;
};

}  // namespace rlhf

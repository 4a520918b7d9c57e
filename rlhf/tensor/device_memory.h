#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace rlhf {

/// Memory of a device and a queue its kernels run in. Uploads, downloads and kernels of one queue happen in
/// the order of the calls; those of two queues in any order, but where one waits for the other.
class DeviceMemory {
 public:
  virtual ~DeviceMemory() = default;
  /// @throws MemoryError when there is no room.
  virtual void* allocate(std::size_t bytes) = 0;
  virtual void release(void* memory) noexcept = 0;
  /// Bytes that were allocated at once, at most, through all queues; 0 where nobody counts.
  virtual std::size_t peak_bytes() const { return 0; }
  /// Copies to the device. `from` may be reused when the call returns.
  virtual void upload(void* to, const void* from, std::size_t bytes) = 0;
  /// Copies from the device and waits until that is done. @throws Error naming a fault of an earlier kernel.
  virtual void download(void* to, const void* from, std::size_t bytes) = 0;
  /// Copies between places on the device that do not overlap.
  virtual void copy(void* to, const void* from, std::size_t bytes) = 0;
  virtual void zero(void* memory, std::size_t bytes) = 0;
  /// Waits for everything queued so far. @throws Error naming a fault of an earlier kernel.
  virtual void synchronize() = 0;
  /// What DeviceKernels take as queue.
  virtual void* queue() = 0;

  /// Another queue over the same memory, which must outlive it. The device works on both at once, and first
  /// on an urgent one.
  virtual std::unique_ptr<DeviceMemory> new_queue(bool urgent) = 0;
  /// What is queued here from now on runs after all that `other`, a queue of the same device, holds by now.
  /// Does not wait on the host.
  virtual void wait_for(DeviceMemory& other) = 0;

  /// As upload and download, but may return before the copy has happened: until this queue was waited for,
  /// the host does not write `from`, and neither reads nor writes `to`.
  virtual void queue_upload(void* to, const void* from, std::size_t bytes) { upload(to, from, bytes); }
  virtual void queue_download(void* to, const void* from, std::size_t bytes) { download(to, from, bytes); }
  /// Keeps the host's memory in place, so that copies of it need not pass through a buffer of the driver.
  virtual void pin(void* /*memory*/, std::size_t /*bytes*/) {}
  virtual void unpin(void* /*memory*/) noexcept {}

  /// Kernels and copies inside the device that were queued once and are queued again as one.
  class Recording {
   public:
    virtual ~Recording() = default;
    virtual void replay() = 0;
  };
  /// Calls `work` and records what it queues from this thread, without running it. It may neither allocate
  /// nor touch the host's memory, and what it was given must stay where it is. Null: this device cannot, and
  /// `work` was not called.
  virtual std::unique_ptr<Recording> record(const std::function<void()>& /*work*/) { return nullptr; }
};

/// The CPU's own memory. The queue is what its kernels need: a `const Compute<T>*`.
class HostMemory : public DeviceMemory {
 public:
  explicit HostMemory(void* queue) : queue_(queue) {}
  void* allocate(std::size_t bytes) override {
    void* memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!memory && bytes > 0) throw std::bad_alloc();
    return memory;
  }
  void release(void* memory) noexcept override { std::free(memory); }
  void upload(void* to, const void* from, std::size_t bytes) override {
    if (bytes > 0) std::memcpy(to, from, bytes);
  }
  void download(void* to, const void* from, std::size_t bytes) override { upload(to, from, bytes); }
  void copy(void* to, const void* from, std::size_t bytes) override { upload(to, from, bytes); }
  void zero(void* memory, std::size_t bytes) override {
    if (bytes > 0) std::memset(memory, 0, bytes);
  }
  void synchronize() override {}
  void* queue() override { return queue_; }
  std::unique_ptr<DeviceMemory> new_queue(bool /*urgent*/) override {
    return std::make_unique<HostMemory>(queue_);
  }
  void wait_for(DeviceMemory& /*other*/) override {}

 private:
  void* queue_;
};

/// Memory of the host that is pinned for a device, which must outlive it. Move-only.
class PinnedMemory {
 public:
  PinnedMemory() = default;
  PinnedMemory(DeviceMemory& device, void* memory, std::size_t bytes) : device_(&device), memory_(memory) {
    if (bytes > 0)
      device.pin(memory, bytes);
    else
      device_ = nullptr;
  }
  PinnedMemory(PinnedMemory&& other) noexcept
      : device_(std::exchange(other.device_, nullptr)), memory_(other.memory_) {}
  PinnedMemory& operator=(PinnedMemory&& other) noexcept {
    std::swap(device_, other.device_);
    std::swap(memory_, other.memory_);
    return *this;
  }
  ~PinnedMemory() {
    if (device_) device_->unpin(memory_);
  }

 private:
  DeviceMemory* device_ = nullptr;
  void* memory_ = nullptr;
};

/// An array of trivially copyable elements on a device, which must outlive it. Move-only.
template <class V>
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  DeviceBuffer(DeviceMemory& memory, std::size_t size)
      : memory_(&memory),
        size_(size),
        data_(static_cast<V*>(size ? memory.allocate(size * sizeof(V)) : nullptr)) {}
  DeviceBuffer(DeviceMemory& memory, const std::vector<V>& values) : DeviceBuffer(memory, values.size()) {
    if (size_ > 0) memory_->upload(data_, values.data(), size_ * sizeof(V));
  }
  DeviceBuffer(DeviceBuffer&& other) noexcept
      : memory_(other.memory_),
        size_(std::exchange(other.size_, 0)),
        data_(std::exchange(other.data_, nullptr)) {}
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    std::swap(memory_, other.memory_);
    std::swap(size_, other.size_);
    std::swap(data_, other.data_);
    return *this;
  }
  ~DeviceBuffer() {
    if (data_) memory_->release(data_);
  }

  V* data() { return data_; }
  const V* data() const { return data_; }
  std::size_t size() const { return size_; }
  /// A copy on the host; waits for the device.
  std::vector<V> values() const {
    std::vector<V> out(size_);
    if (size_ > 0) memory_->download(out.data(), data_, size_ * sizeof(V));
    return out;
  }

 private:
  DeviceMemory* memory_ = nullptr;
  std::size_t size_ = 0;
  V* data_ = nullptr;
};

}  // namespace rlhf

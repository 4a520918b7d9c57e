#pragma once

#include <functional>
#include <mutex>

#include "rlhf/memory/arena_layout.h"
#include "rlhf/tensor/device_memory.h"

namespace rlhf {

/// One allocation that K/V slabs and buffers share, as ArenaLayout says. Buffers come out of it as out of any
/// DeviceMemory; addresses never change. Thread-safe, apart from open().
class Arena : public DeviceMemory {
 public:
  /// Makes room for `bytes` more contiguous ones, e.g. by taking slabs away. Called without locks, from the
  /// thread that allocates. @return false when nothing could be done
  using MakeRoom = std::function<bool(std::size_t bytes)>;

  Arena() = default;
  ~Arena() override;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  /// Takes the memory: of `device`, or, without one, address space of the process whose pages are taken when
  /// they are touched. Once. @throws MemoryError when there is not so much.
  void open(std::size_t capacity, std::size_t slab_bytes, DeviceMemory* device = nullptr);
  void set_make_room(MakeRoom make_room) { make_room_ = std::move(make_room); }

  /// Address of slab 0, the highest; slab i lies i * slab_bytes below.
  void* first_slab() const { return base_ + layout_.capacity() - layout_.slab_bytes(); }
  bool try_set_slabs(std::int64_t slabs);
  /// Gives the process's pages between pieces and slabs back to the system; their contents are lost.
  void discard_free();
  /// A copy of the bookkeeping as it is now.
  ArenaLayout layout() const;

  /// @throws MemoryError when there is no room, and none can be made.
  void* allocate(std::size_t bytes) override;
  void release(void* memory) noexcept override;
  std::size_t peak_bytes() const override { return layout().peak_bytes(); }
  void upload(void* to, const void* from, std::size_t bytes) override { below().upload(to, from, bytes); }
  void download(void* to, const void* from, std::size_t bytes) override { below().download(to, from, bytes); }
  void copy(void* to, const void* from, std::size_t bytes) override { below().copy(to, from, bytes); }
  void zero(void* memory, std::size_t bytes) override { below().zero(memory, bytes); }
  void synchronize() override { below().synchronize(); }
  void* queue() override { return below().queue(); }
  std::unique_ptr<DeviceMemory> new_queue(bool urgent) override { return below().new_queue(urgent); }
  void wait_for(DeviceMemory& other) override { below().wait_for(other); }
  void queue_upload(void* to, const void* from, std::size_t bytes) override {
    below().queue_upload(to, from, bytes);
  }
  void queue_download(void* to, const void* from, std::size_t bytes) override {
    below().queue_download(to, from, bytes);
  }
  void pin(void* memory, std::size_t bytes) override { below().pin(memory, bytes); }
  void unpin(void* memory) noexcept override { below().unpin(memory); }
  std::unique_ptr<Recording> record(const std::function<void()>& work) override {
    return below().record(work);
  }

 private:
  DeviceMemory& below() { return device_ ? *device_ : host_; }

  DeviceMemory* device_ = nullptr;
  HostMemory host_{nullptr};
  char* base_ = nullptr;
  std::size_t mapped_bytes_ = 0;
  MakeRoom make_room_;
  mutable std::mutex mutex_;  ///< guards layout_
  ArenaLayout layout_;
};

}  // namespace rlhf

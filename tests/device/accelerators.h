#pragma once
// The accelerators that whole models run on in tests: the CUDA kernels' sources on the emulator, with memory
// that only they and the copies can touch, and a GPU where there is one.

#include <sys/mman.h>

#include <functional>
#include <mutex>
#include <string>

#include "rlhf/core/error.h"
#include "rlhf/kernels/open_device.h"
#include "rlhf/memory/arena_layout.h"
#include "tests/cuda/devices.h"

namespace rlhf {

/// What the emulator calls around every kernel.
void set_emulator_hooks(void (*before)(void*), void (*after)(void*), void* context);

/// Where the emulator puts this thread's kernels in place of running them; null = it runs them.
std::vector<std::function<void()>>*& emulator_recorder();

/// Device memory of the emulator. The host's code cannot read or write it: an access crashes the test.
class GuardedMemory : public DeviceMemory {
 public:
  explicit GuardedMemory(std::size_t bytes) : layout_(bytes, 64) {
    base_ = static_cast<char*>(
        mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (base_ == MAP_FAILED) fail<MemoryError>("guarded memory: no address space");
    set_emulator_hooks([](void* self) { static_cast<GuardedMemory*>(self)->open(); },
                       [](void* self) { static_cast<GuardedMemory*>(self)->close(); }, this);
  }
  ~GuardedMemory() override {
    set_emulator_hooks(nullptr, nullptr, nullptr);
    munmap(base_, layout_.capacity());
  }
  GuardedMemory(const GuardedMemory&) = delete;

  void* allocate(std::size_t bytes) override {
    if (recorder()) fail<InternalError>("guarded memory: an allocation was recorded");
    const std::lock_guard lock(mutex_);
    const auto offset = layout_.try_allocate(bytes);
    if (!offset) fail<MemoryError>("guarded memory: no room for ", bytes, " bytes");
    return base_ + *offset;
  }
  void release(void* memory) noexcept override {
    const std::lock_guard lock(mutex_);
    layout_.release(static_cast<std::size_t>(static_cast<char*>(memory) - base_));
  }
  void upload(void* to, const void* from, std::size_t bytes) override {
    if (recorder()) fail<InternalError>("guarded memory: an upload was recorded");
    copy(to, from, bytes);
  }
  void download(void* to, const void* from, std::size_t bytes) override {
    if (recorder()) fail<InternalError>("guarded memory: a download was recorded");
    copy(to, from, bytes);
  }
  void copy(void* to, const void* from, std::size_t bytes) override {
    if (recorder()) return recorder()->push_back([=, this] { copy(to, from, bytes); });
    open();
    if (bytes > 0) std::memcpy(to, from, bytes);
    close();
  }
  void zero(void* memory, std::size_t bytes) override {
    if (recorder()) return recorder()->push_back([=, this] { zero(memory, bytes); });
    open();
    if (bytes > 0) std::memset(memory, 0, bytes);
    close();
  }
  void synchronize() override {}
  void* queue() override { return nullptr; }
  std::unique_ptr<Recording> record(const std::function<void()>& work) override {
    auto recording = std::make_unique<Calls>();
    recorder() = &recording->calls;
    work();
    recorder() = nullptr;
    return recording;
  }

 private:
  using CallList = std::vector<std::function<void()>>;
  struct Calls : Recording {
    CallList calls;
    void replay() override {
      for (const auto& call : calls) call();
    }
  };
  static CallList*& recorder() { return emulator_recorder(); }

  // One kernel or copy at a time, as in a stream: the emulator knows one thread of the host only.
  void open() {
    mutex_.lock();
    protect(PROT_READ | PROT_WRITE);
  }
  void close() {
    protect(PROT_NONE);
    mutex_.unlock();
  }
  void protect(int access) {
    if (mprotect(base_, layout_.capacity(), access) != 0)
      fail<InternalError>("guarded memory: mprotect failed");
  }

  std::mutex mutex_;
  ArenaLayout layout_;
  char* base_ = nullptr;
};

/// Calls body(accelerator) on every one. Products are the own ones, which sum in one order whatever the
/// batch.
template <class Body>
void on_every_accelerator(const Body& body) {
  if (wants_device("emulated")) {
    GuardedMemory memory(std::size_t{1} << 30);
    body(Accelerator{&emulated_kernels<Bfloat16>(), &memory, std::uint64_t{1} << 30, "emulated", 1e9});
  }
  if (!wants_device("cuda") || !cuda_status().usable) return;
  const auto cuda = CudaDevice::open();
  body(Accelerator{&cuda_device_kernels<Bfloat16>(CudaProducts::kOwn), cuda.get(), cuda->total_bytes(),
                   "cuda"});
}

}  // namespace rlhf

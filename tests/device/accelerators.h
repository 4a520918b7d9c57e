#pragma once
// The accelerators that whole models run on in tests: the CUDA kernels' sources on the emulator, with memory
// that only they and the copies can touch, and a GPU where there is one.

#include <sys/mman.h>

#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "rlhf/core/error.h"
#include "rlhf/kernels/open_device.h"
#include "rlhf/memory/arena_layout.h"
#include "rlhf/tensor/allocation_counter.h"
#include "tests/cuda/devices.h"
#include "tests/cuda/emulator_queue.h"

namespace rlhf {

/// What the emulator calls around every kernel.
void set_emulator_hooks(void (*before)(void*), void (*after)(void*), void* context);

/// Where the emulator puts this thread's kernels in place of running them; null = it runs them.
std::vector<std::function<void()>>*& emulator_recorder();

/// The emulator's device memory. The host's code cannot read or write it: an access crashes the test.
class GuardedSpace {
 public:
  explicit GuardedSpace(std::size_t bytes) : layout_(bytes, 64) {
    base_ = static_cast<char*>(
        mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (base_ == MAP_FAILED) fail<MemoryError>("guarded memory: no address space");
    set_emulator_hooks([](void* self) { static_cast<GuardedSpace*>(self)->protect(PROT_READ | PROT_WRITE); },
                       [](void* self) { static_cast<GuardedSpace*>(self)->protect(PROT_NONE); }, this);
  }
  ~GuardedSpace() {
    set_emulator_hooks(nullptr, nullptr, nullptr);
    munmap(base_, layout_.capacity());
  }
  GuardedSpace(const GuardedSpace&) = delete;

  void* allocate(std::size_t bytes) {
    const auto offset = layout_.try_allocate(bytes);
    if (!offset) fail<MemoryError>("guarded memory: no room for ", bytes, " bytes");
    counter_.add(base_ + *offset, bytes);
    return base_ + *offset;
  }
  void release(void* memory) {
    counter_.remove(memory);
    layout_.release(static_cast<std::size_t>(static_cast<char*>(memory) - base_));
  }
  std::size_t peak_bytes() const { return counter_.peak_bytes(); }
  template <class Fn>
  void open(const Fn& fn) {
    protect(PROT_READ | PROT_WRITE);
    fn();
    protect(PROT_NONE);
  }

  /// Held by whoever uses a queue or lets work run: the emulator knows one thread of the host only.
  std::recursive_mutex mutex;

 private:
  void protect(int access) {
    if (mprotect(base_, layout_.capacity(), access) != 0)
      fail<InternalError>("guarded memory: mprotect failed");
  }

  ArenaLayout layout_;
  char* base_ = nullptr;
  AllocationCounter counter_;
};

/// Work that was queued and has not run.
class QueuedCalls {
 public:
  std::int64_t num_pushed() const { return num_pushed_; }
  void push(std::function<void()> call) {
    calls_.push_back(std::move(call));
    ++num_pushed_;
  }
  /// Runs the first `count` of all that were ever pushed, as far as they have not run.
  void run_first(std::int64_t count) {
    while (num_pushed_ - static_cast<std::int64_t>(calls_.size()) < count) {
      const auto call = std::move(calls_.front());
      calls_.pop_front();
      call();
    }
  }

 private:
  std::deque<std::function<void()>> calls_;
  std::int64_t num_pushed_ = 0;
};

/// A queue whose work runs as late as it may: when the host waits for it, or another queue's work that waits
/// for it runs. Further queues are alike; or early: theirs runs when it is queued, before what others hold;
/// or they are this queue, and everything happens in the order of the calls. Where an order is missing
/// between two queues, one reads what is not there yet, or no longer.
enum class FurtherQueues { kLate, kEarly, kThisOne };
class LooseQueue : public DeviceMemory, public EmulatorQueue {
 public:
  explicit LooseQueue(std::shared_ptr<GuardedSpace> space, FurtherQueues further = FurtherQueues::kLate)
      : space_(std::move(space)), further_(further) {}
  ~LooseQueue() override { run_all(); }

  void* allocate(std::size_t bytes) override {
    if (recorder()) fail<InternalError>("guarded memory: an allocation was recorded");
    const std::lock_guard lock(space_->mutex);
    return space_->allocate(bytes);
  }
  void release(void* memory) noexcept override {
    const std::lock_guard lock(space_->mutex);
    run_all();
    space_->release(memory);
  }
  std::size_t peak_bytes() const override { return space_->peak_bytes(); }
  void upload(void* to, const void* from, std::size_t bytes) override {
    const auto* const begin = static_cast<const char*>(from);
    push_copy("an upload", [to, bytes, values = std::vector<char>(begin, begin + bytes)] {
      std::memcpy(to, values.data(), bytes);
    });
  }
  void download(void* to, const void* from, std::size_t bytes) override {
    queue_download(to, from, bytes);
    synchronize();
  }
  void queue_upload(void* to, const void* from, std::size_t bytes) override {
    push_copy("an upload", [=] { std::memcpy(to, from, bytes); });
  }
  void queue_download(void* to, const void* from, std::size_t bytes) override {
    push_copy("a download", [=] { std::memcpy(to, from, bytes); });
  }
  void copy(void* to, const void* from, std::size_t bytes) override {
    push_or_record([=] { std::memcpy(to, from, bytes); });
  }
  void zero(void* memory, std::size_t bytes) override {
    push_or_record([=] { std::memset(memory, 0, bytes); });
  }
  void synchronize() override { run_all(); }
  void* queue() override { return static_cast<EmulatorQueue*>(this); }
  std::unique_ptr<DeviceMemory> new_queue(bool /*urgent*/) override {
    auto queue = std::make_unique<LooseQueue>(space_, further_);
    if (further_ == FurtherQueues::kThisOne) queue->calls_ = calls_;
    queue->is_early_ = further_ == FurtherQueues::kEarly;
    return queue;
  }
  void wait_for(DeviceMemory& other) override {
    const std::lock_guard lock(space_->mutex);
    auto* const before = static_cast<LooseQueue*>(static_cast<EmulatorQueue*>(other.queue()));
    push([calls = before->calls_, mark = before->calls_->num_pushed()] { calls->run_first(mark); });
  }
  std::unique_ptr<Recording> record(const std::function<void()>& work) override {
    auto recording = std::make_unique<Replay>(*this);
    recorder() = &recording->calls;
    work();
    recorder() = nullptr;
    return recording;
  }
  void push(std::function<void()> work) override {
    const std::lock_guard lock(space_->mutex);
    calls_->push(std::move(work));
    if (is_early_) run_all();
  }

 private:
  using Recorded = std::vector<std::function<void()>>;
  struct Replay : Recording {
    explicit Replay(LooseQueue& queue_) : queue(queue_) {}
    LooseQueue& queue;
    Recorded calls;
    void replay() override {
      for (const auto& call : calls) queue.push(call);
    }
  };
  static Recorded*& recorder() { return emulator_recorder(); }

  template <class Fn>
  void push_copy(const char* what, Fn fn) {
    if (recorder()) fail<InternalError>("guarded memory: ", what, " was recorded");
    push_or_record(std::move(fn));
  }
  template <class Fn>
  void push_or_record(Fn fn) {
    auto work = [fn = std::move(fn), space = space_.get()] { space->open(fn); };
    if (recorder())
      recorder()->push_back(std::move(work));
    else
      push(std::move(work));
  }
  void run_all() {
    const std::lock_guard lock(space_->mutex);
    calls_->run_first(calls_->num_pushed());
  }

  std::shared_ptr<GuardedSpace> space_;
  std::shared_ptr<QueuedCalls> calls_ = std::make_shared<QueuedCalls>();
  FurtherQueues further_;
  bool is_early_ = false;
};

/// The emulator with this memory.
inline Accelerator emulated_accelerator(DeviceMemory& memory) {
  return {&emulated_kernels<Bfloat16>(), &memory, std::uint64_t{1} << 30, "emulated", 1e9};
}

/// Calls body(accelerator) on every one. Products are the own ones, which sum in one order whatever the
/// batch.
template <class Body>
void on_every_accelerator(const Body& body) {
  if (wants_device("emulated")) {
    LooseQueue memory(std::make_shared<GuardedSpace>(std::size_t{1} << 30));
    body(emulated_accelerator(memory));
  }
  if (!wants_device("cuda") || !cuda_status().usable) return;
  const auto cuda = CudaDevice::open();
  body(Accelerator{&cuda_device_kernels<Bfloat16>(CudaProducts::kOwn), cuda.get(), cuda->total_bytes(),
                   "cuda"});
}

}  // namespace rlhf

#include "rlhf/tensor/arena.h"

#include <sys/mman.h>

#include <cerrno>

#include "rlhf/core/error.h"

namespace rlhf {
namespace {

constexpr std::size_t kLargePage = std::size_t{2} << 20;

}  // namespace

Arena::~Arena() {
  if (device_ && base_) device_->release(base_);
  if (mapped_bytes_ > 0) munmap(base_, mapped_bytes_);
}

void Arena::open(std::size_t capacity, std::size_t slab_bytes, DeviceMemory* device) {
  RLHF_CHECK(!base_, "arena: opened twice");
  layout_ = ArenaLayout(capacity, slab_bytes);
  device_ = device;
  if (device) {
    base_ = static_cast<char*>(device->allocate(layout_.capacity()));
    return;
  }
  // A page to spare: an empty mapping is refused.
  const std::size_t bytes = (layout_.capacity() / kLargePage + 1) * kLargePage;
  void* const got =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (got == MAP_FAILED)
    fail<MemoryError>("arena: the system gives no address space of ", bytes, " bytes: ", strerror(errno));
  base_ = static_cast<char*>(got);
  mapped_bytes_ = bytes;
  madvise(base_, bytes, MADV_HUGEPAGE);  // where the system refuses, the pages are small
}

bool Arena::try_set_slabs(std::int64_t slabs) {
  const std::lock_guard lock(mutex_);
  return layout_.try_set_slabs(slabs);
}

void Arena::discard_free() {
  const std::lock_guard lock(mutex_);
  if (device_) return;
  const std::size_t first = (layout_.top() + kLargePage - 1) / kLargePage * kLargePage,
                    last = layout_.boundary() / kLargePage * kLargePage;
  // A refusal only keeps the memory.
  if (first < last) madvise(base_ + first, last - first, MADV_DONTNEED);
}

ArenaLayout Arena::layout() const {
  const std::lock_guard lock(mutex_);
  return layout_;
}

void* Arena::allocate(std::size_t bytes) {
  while (true) {
    std::size_t missing = 0;
    {
      const std::lock_guard lock(mutex_);
      if (const auto offset = layout_.try_allocate(bytes)) return base_ + *offset;
      missing = layout_.top() + bytes + ArenaLayout::kAlignment - layout_.boundary();
    }
    if (!make_room_ || !make_room_(missing)) {
      const ArenaLayout now = layout();
      fail<MemoryError>("arena: no room for ", bytes, " bytes beside ", now.slabs(), " slabs of ",
                        now.slab_bytes(), " and pieces up to byte ", now.top(), " of ", now.capacity());
    }
  }
}

void Arena::release(void* memory) noexcept {
  const std::lock_guard lock(mutex_);
  layout_.release(static_cast<std::size_t>(static_cast<char*>(memory) - base_));
}

}  // namespace rlhf

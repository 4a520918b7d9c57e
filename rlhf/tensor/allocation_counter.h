#pragma once

#include <algorithm>
#include <cstddef>
#include <mutex>
#include <unordered_map>

namespace rlhf {

/// Counts what an allocator has handed out. Thread-safe.
class AllocationCounter {
 public:
  void add(const void* memory, std::size_t bytes) {
    const std::lock_guard lock(mutex_);
    sizes_[memory] = bytes;
    held_ += bytes;
    peak_ = std::max(peak_, held_);
  }
  void remove(const void* memory) {
    const std::lock_guard lock(mutex_);
    const auto found = sizes_.find(memory);
    if (found == sizes_.end()) return;
    held_ -= found->second;
    sizes_.erase(found);
  }
  /// Bytes that were handed out at once, at most.
  std::size_t peak_bytes() const {
    const std::lock_guard lock(mutex_);
    return peak_;
  }

 private:
  mutable std::mutex mutex_;
  std::unordered_map<const void*, std::size_t> sizes_;
  std::size_t held_ = 0, peak_ = 0;
};

}  // namespace rlhf

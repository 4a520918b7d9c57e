#pragma once

#include <bit>
#include <cstddef>
#include <cstring>
#include <span>
#include <vector>

#include "rlhf/tensor/buffer.h"
#include "rlhf/tensor/device_memory.h"

namespace rlhf {

/// Small arrays that go to a device together, in one copy. Reused: what was uploaded before is overwritten,
/// behind all that is queued.
class Staging {
 public:
  /// @param memory of the device; must outlive this
  explicit Staging(DeviceMemory& memory) : memory_(&memory), device_(0, &memory) {}

  /// Place of an array in the next upload.
  template <class V>
  struct Place {
    std::size_t offset = 0;
  };

  void clear() { host_.clear(); }
  template <class V>
  Place<V> add(std::span<const V> values) {
    const Place<V> place{host_.size()};
    host_.resize(host_.size() + (values.size_bytes() + kAlignment - 1) / kAlignment * kAlignment);
    if (!values.empty()) std::memcpy(host_.data() + place.offset, values.data(), values.size_bytes());
    return place;
  }
  template <class V>
  Place<V> add(const std::vector<V>& values) {
    return add(std::span<const V>(values));
  }
  /// Makes the addresses known, after the last add. Contents may still be changed with `host`.
  void reserve() { device_.reserve_discard(host_.size()); }
  /// As `reserve`, with room to spare: arrays that grow a little every time keep their addresses.
  void reserve_spare() {
    if (host_.size() > device_.size()) device_.reserve_discard(std::bit_ceil(host_.size()));
  }
  template <class V>
  V* host(Place<V> place) {
    return reinterpret_cast<V*>(host_.data() + place.offset);
  }
  template <class V>
  V* device(Place<V> place) {
    return reinterpret_cast<V*>(device_.data() + place.offset);
  }
  /// Held on the device.
  std::size_t bytes() const { return device_.bytes(); }
  /// Queues the copy, after `reserve`.
  void upload() {
    if (!host_.empty()) memory_->upload(device_.data(), host_.data(), host_.size());
  }

 private:
  static constexpr std::size_t kAlignment = 16;

  DeviceMemory* memory_;
  std::vector<std::byte> host_;
  Buffer<std::byte> device_;
};

}  // namespace rlhf

#pragma once

#include <chrono>
#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "rlhf/distributed/collective.h"
#include "rlhf/tensor/device_memory.h"

namespace rlhf {

/// What the ranks of a run do together with arrays in the memories of their devices, of which each rank has
/// one. Every rank calls the same functions with arrays of the same size in the same order, from one thread.
/// Work happens in the order of the device's queue; slices are those of `slice_of`.
///
/// Only what is large goes this way: numbers that decide something (the gradient's norm, whether to stop)
/// are summed by the host's Collective, in one order and therefore to the same bits on every rank.
/// @throws CollectiveError from every function; it cannot be used after that.
class DeviceCollective {
 public:
  virtual ~DeviceCollective() = default;

  /// Who carries the numbers, in words.
  virtual const std::string& text() const = 0;
  /// The same ranks on the host.
  virtual Collective& host() const = 0;
  /// This rank's slice of `count` elements.
  Slice slice(std::size_t count) const { return slice_of(count, host().rank(), host().world_size()); }
  /// Replaces this rank's slice of [count] by its sum over all ranks. What the other slices hold then is
  /// nobody's business.
  virtual void reduce_scatter(float* values, std::size_t count) = 0;
  /// Replaces parts[rank] of an array by its sum over all ranks; the other parts are then nobody's business.
  /// Every rank gives the same parts, one for each rank, which do not overlap and may be empty.
  virtual void reduce_parts(float* values, const std::vector<Slice>& parts) = 0;
  /// Replaces every other rank's slice of [count] elements, of any type, by what that rank has there.
  virtual void all_gather(void* values, std::size_t count, std::size_t element_bytes) = 0;
  /// Waits for everything queued so far, no longer than the time-out. To be called before anything else
  /// waits for the device: a rank that has gone would let that wait for ever.
  virtual void wait() = 0;
};

/// How the devices of a run reach each other.
struct DeviceCollectiveOptions {
  /// Whether everything in a queue of the device is done; empty: NCCL cannot reach the device, everything
  /// goes through the host.
  std::function<bool(void* queue)> is_done = {};
  std::chrono::milliseconds timeout{0};  ///< that a rank waits for another one
  std::string nccl_library = {};         ///< file to open; empty = libnccl.so.2 where it is found
};

/// Carries arrays through the host's memory, in pieces, and sums them with `collective`: in the order of the
/// ranks, the same bits in every run. Both must outlive it.
/// @param reason why it is this one; goes into text()
std::unique_ptr<DeviceCollective> make_staged_collective(Collective& collective, DeviceMemory& memory,
                                                         const std::string& reason,
                                                         std::size_t piece_elements = std::size_t{4} << 20);

/// NCCL (github.com/NVIDIA/nccl) where every rank finds the same version of it, else through the host. Called
/// by all ranks, from the thread that uses the device.
/// @throws CollectiveError when the ranks' devices do not meet within the time-out
std::unique_ptr<DeviceCollective> make_device_collective(Collective& collective, DeviceMemory& memory,
                                                         const DeviceCollectiveOptions& options);

}  // namespace rlhf

#pragma once

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "rlhf/distributed/device_collective.h"
#include "rlhf/kernels/open_device.h"

namespace rlhf {

/// What a rank says of the GPUs it sees.
struct RankGpus {
  std::string machine;             ///< the same for all ranks of one machine
  std::vector<std::string> names;  ///< by number, different for different GPUs; empty = it cannot be used
  std::string problem;             ///< why it can use none
};

/// Number of the GPU that each rank takes: of those that it sees the first that no rank before it on its
/// machine has taken. So it does not matter whether a launcher shows every rank all GPUs or its own alone.
/// Nothing for a rank that finds none.
std::vector<std::optional<int>> choose_gpus(std::span<const RankGpus> ranks);
/// Why not every rank has a GPU, with both numbers where they are too few; empty when every rank has one.
std::string gpu_problem(std::span<const RankGpus> ranks);

/// The device of one rank of a run, opened, and joined with those of the other ranks.
class RankDevice {
 public:
  /// Called by all ranks. AUTO: GPUs if every rank gets one, else the CPU on every rank.
  /// @throws ConfigError for kCuda when not every rank gets a GPU; CollectiveError when they do not meet
  RankDevice(Device wanted, Collective& collective, DeviceCollectiveOptions options);

  /// Null on the CPU.
  const Accelerator* accelerator() const { return accelerator_ ? &*accelerator_ : nullptr; }
  /// Such as "cuda (NVIDIA H100 ...), 8 ranks by NCCL 2.28.9".
  const std::string& text() const { return text_; }

 private:
  std::optional<OpenDevice> device_;
  std::unique_ptr<DeviceCollective> ranks_;
  std::optional<Accelerator> accelerator_;
  std::string text_;
};

}  // namespace rlhf

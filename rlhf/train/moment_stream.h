#pragma once

#include <array>
#include <cstddef>
#include <functional>
#include <memory>
#include <span>

#include "rlhf/tensor/buffer.h"
#include "rlhf/tensor/device_memory.h"

namespace rlhf {

/// An optimizer's two moments in the host's memory, which pass through a device piece by piece: while one
/// piece is updated, the next one comes and the one before goes back, in queues of their own.
class MomentStream {
 public:
  /// Pieces on the device at once, each of both moments.
  static constexpr std::size_t kPlaces = 2;

  /// @param memory in whose queue updates happen; must outlive this, as the moments must. They are pinned,
  /// and only touched on the host after `wait`.
  MomentStream(DeviceMemory& memory, std::span<float> first, std::span<float> second,
               std::size_t piece_elements);
  /// Waits.
  ~MomentStream();

  /// Begins to bring the first piece, ahead of its use.
  void fetch();
  /// Queues an update of elements [begin, begin + count), whose moments are at two places on the device.
  using Update = std::function<void(std::size_t begin, std::size_t count, float* first, float* second)>;
  /// Calls `update` for every piece, in order.
  void pass(const Update& update);
  /// Waits until all updates are on the host, which may then change them.
  void wait();

 private:
  std::size_t count_of(std::size_t piece) const;
  float* place_of(std::size_t piece, int moment);
  void bring(std::size_t piece);
  void take_back(std::size_t piece);

  DeviceMemory& memory_;
  std::array<std::span<float>, 2> moments_;
  std::size_t piece_elements_, num_pieces_;
  std::unique_ptr<DeviceMemory> coming_, going_;  ///< queues
  std::array<PinnedMemory, 2> pinned_;
  Buffer<float> places_;
  bool fetched_ = false;
};

}  // namespace rlhf

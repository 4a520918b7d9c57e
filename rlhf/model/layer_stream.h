#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "rlhf/kernels/bfloat16.h"
#include "rlhf/tensor/buffer.h"
#include "rlhf/tensor/device_memory.h"

namespace rlhf {

/// Where a model's frozen layers are that runs on an accelerator: there, or in the host's memory, from where
/// each comes while the one before is computed.
enum class FrozenLayers { kOnDevice, kOnHost };

/// Places [begin, end) in a flat buffer.
struct ElementRange {
  std::size_t begin = 0, end = 0;

  std::size_t size() const { return end - begin; }
  bool holds(std::size_t i) const { return i >= begin && i < end; }
};

/// Frozen layers of a model in the host's memory, rounded and pinned, that come to a device in a queue of
/// their own, one ahead of use. Used by passes in one queue; layers in ascending order are what it is made
/// for, any other works.
class LayerStream {
 public:
  /// Layers on the device at once.
  static constexpr std::size_t kPlaces = 2;

  /// @param memory in whose queue passes run; must outlive this
  /// @param layers their places in the model's flat frozen buffer; empty = the layer is elsewhere
  LayerStream(DeviceMemory& memory, std::vector<ElementRange> layers);
  ~LayerStream();

  /// Elements that stay on the host: [first(), first() + num_elements()) of the frozen buffer.
  std::size_t first() const { return first_; }
  std::size_t num_elements() const { return rounded_.size(); }
  /// The range that holds place `i` of the frozen buffer, or null.
  const ElementRange* range_of(std::size_t i) const;
  /// Where place `i`, in a range, is on the device while its layer is in use.
  const Bfloat16* address_of(std::size_t i) const;
  /// Bytes on the device.
  std::size_t bytes() const { return places_.bytes(); }

  /// Takes the layers' weights from the flat buffer. Waits until no copy of the old ones is on its way.
  void set(std::span<const float> flat);
  /// What the passes' queue runs from now on finds layer `layer`, until the next call. The next layer comes
  /// meanwhile.
  void use(std::int64_t layer);

 private:
  std::size_t place_of(std::size_t layer) const { return layer % kPlaces; }
  bool is_there(std::size_t layer) const {
    return there_[place_of(layer)] == static_cast<std::int64_t>(layer);
  }
  void bring(std::size_t layer);

  DeviceMemory& memory_;
  std::vector<ElementRange> layers_;
  std::size_t first_ = 0, largest_ = 0;  ///< element of the first layer; elements of the largest
  std::vector<Bfloat16> rounded_;        ///< from first_ on
  PinnedMemory pinned_;
  Buffer<Bfloat16> places_;
  std::array<std::int64_t, kPlaces> there_{-1, -1};
  std::unique_ptr<DeviceMemory> coming_;
};

}  // namespace rlhf

#pragma once

#include <atomic>
#include <cstddef>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "rlhf/distributed/collective.h"
#include "rlhf/kernels/accelerator.h"
#include "rlhf/model/decoder_weights.h"
#include "rlhf/model/layer_stream.h"
#include "rlhf/model/sliced_gradient.h"
#include "rlhf/tensor/buffer.h"

namespace rlhf {

/// A flat array of frozen weights, which several models may share: on the host and, once a model that reads
/// it runs there, rounded on a device, without the layers that stay on the host.
struct FrozenWeights {
  explicit FrozenWeights(std::size_t size) : host(size) {}

  Buffer<float> host;
  Buffer<Bfloat16> device;
  std::atomic<bool> device_is_old = true;
  std::mutex uploading;
};

/// One model's weights in a device's memory. What learns is there as float master weights with their
/// gradient, and rounded for passes; what is frozen is there rounded only. With several ranks
/// (Accelerator::ranks) each has the master weights of its slice alone.
///
/// The host has the same weights; either side may be written. It says so here, and the other side is brought
/// up to date when it is read next. What the host has written is there for every queue of the device; what
/// the device writes is ordered by the accelerator's queue alone.
class ResidentWeights {
 public:
  /// Where the model's weights are on the host. All must outlive this.
  struct Host {
    std::vector<std::shared_ptr<FrozenWeights>> frozen;
    std::span<float> learning;
    std::span<float> gradient;  ///< empty for a model that is not trained here
    /// Layers of frozen.back(), which is this model's alone, that stay on the host. Empty = none does.
    std::vector<ElementRange> host_layers;
    /// Of a gradient that is held in slices (Parameters::slice_gradient); none = all of it.
    std::optional<GradientParts> gradient_parts;
  };
  ResidentWeights(const Accelerator& accelerator, const DecoderWeights<float>& weights, Host host);

  const Accelerator& accelerator() const { return accelerator_; }
  /// For passes. Brings what the host has written; may be called from several threads.
  const DecoderWeights<Bfloat16>& weights();

  /// What an optimizer reads and writes on the device: [size()], the master weights [slice().size()]. Call
  /// `weights` before and `device_written` after it.
  std::size_t size() const { return host_.learning.size(); }
  Slice slice() const { return slice_; }
  float* master() { return master_.data(); }
  Bfloat16* shadow() { return shadow_.data(); }
  /// Null where the gradient is held in slices.
  float* gradient() { return gradient_.data(); }
  /// This rank's slice of the gradient, summed over the ranks: of a whole gradient it is summed now, by all
  /// ranks together.
  float* own_gradient();
  void zero_gradient();
  /// Holds this rank's slice of the gradient alone from now on. @param weights as in the constructor
  void slice_gradient(const DecoderWeights<float>& weights, GradientParts parts);
  SlicedGradient* sliced_gradient() const { return sliced_.get(); }

  /// The host's learning weights have been, or are about to be, written; frozen ones say so themselves.
  void host_written() { device_is_old_ = true; }
  void device_written() { host_is_old_ = true; }
  /// Brings what the device has written; with several ranks from all of them: they call it together.
  void update_host();
  /// kernels::hash_floats of what learns, without bringing it to the host; with several ranks of the slices
  /// of all of them: they call it together.
  std::uint64_t learned_hash() const;
  /// Takes over what another model of the same shape has learned, on the device.
  void copy_from(ResidentWeights& other);

  /// Bytes on the device: of this model's own weights (master and rounded) and gradient.
  std::size_t learning_bytes() const { return master_.bytes() + shadow_.bytes(); }
  std::size_t frozen_bytes() const;
  std::size_t gradient_bytes() const { return sliced_ ? sliced_->bytes() : gradient_.bytes(); }

 private:
  void hold_gradient();
  void map(const DecoderWeights<float>& weights);
  void upload();
  void upload_frozen(FrozenWeights& frozen);
  void upload_rounded(Bfloat16* to, std::span<const float> from);
  const Bfloat16* frozen_address(FrozenWeights& frozen, std::size_t i);
  std::size_t num_on_device(const FrozenWeights& frozen) const;

  Accelerator accelerator_;
  Host host_;
  Slice slice_;
  std::mutex mutex_;  ///< of `weights`
  std::atomic<bool> device_is_old_ = true, host_is_old_ = false;
  Buffer<float> master_, gradient_;
  std::unique_ptr<SlicedGradient> sliced_;  ///< in place of gradient_
  Buffer<Bfloat16> shadow_;
  std::unique_ptr<LayerStream> stream_;  ///< of frozen.back()
  DecoderWeights<Bfloat16> weights_;
};

/// The weights that a pass on an accelerator reads. @throws InvalidArgument when the model was not placed
/// there
const DecoderWeights<Bfloat16>& resident_weights(const DecoderWeights<float>& weights);

}  // namespace rlhf

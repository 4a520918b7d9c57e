#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "rlhf/distributed/collective.h"
#include "rlhf/model/gradient_sink.h"
#include "rlhf/tensor/buffer.h"

namespace rlhf {

struct Accelerator;

/// Where a model's gradient lies in the flat buffer of what learns, by when backward is done with it: places
/// of each layer, and of what belongs to no layer (embedding, final norm, head), in ascending order.
struct GradientParts {
  std::vector<std::vector<Slice>> layers;
  std::vector<Slice> rest;

  /// Elements of all of them.
  std::size_t size() const;
};

/// The gradient of a model on a rank that holds its slice alone (ZeRO stage 2, Rajbhandari et al. 2020).
/// Passes add to a buffer as long as the largest layer, which every layer in turn has, and to one of what
/// belongs to no layer, which lives through the pass. What is complete is summed over the ranks at once, each
/// slice to its rank, and the buffer is zero again. So every backward pass is a collective operation.
class SlicedGradient : public GradientSink {
 public:
  /// @param ranks must outlive this
  SlicedGradient(GradientParts parts, Collective& ranks);
  /// In the memory of a device with ranks (Accelerator::ranks), which sum there; it must outlive this. Each
  /// sum is waited for, so that a rank that has gone is noticed before anything else waits for the device.
  SlicedGradient(GradientParts parts, const Accelerator& device);

  /// Where passes add the gradient of element `i` of the flat buffer. Neighbours in one part are neighbours
  /// here.
  float* address(std::size_t i);
  void layer_done(std::int64_t layer) override;
  void pass_done() override;
  void skip_pass() override;

  Collective& ranks() const { return ranks_; }
  /// Place of this rank's slice in the flat buffer.
  const Slice& place() const { return slice_; }
  /// This rank's slice, summed over all ranks and the passes since it was zero; on an accelerator, for its
  /// kernels only.
  std::span<float> values() { return {sums_.data(), sums_.size()}; }
  void zero();
  std::size_t bytes() const { return sums_.bytes() + layer_.bytes() + rest_.bytes(); }

 private:
  SlicedGradient(GradientParts parts, Collective& ranks, const Accelerator* device);
  void add_sums(const std::vector<Slice>& part, Buffer<float>& buffer);
  void add(float* to, const float* from, std::size_t count);
  void set_zero(float* at, std::size_t count);

  GradientParts parts_;
  Collective& ranks_;
  const Accelerator* device_;
  std::size_t count_;
  Slice slice_;
  Buffer<float> sums_, layer_, rest_;
};

}  // namespace rlhf

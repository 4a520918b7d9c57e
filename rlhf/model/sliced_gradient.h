#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "rlhf/distributed/collective.h"
#include "rlhf/model/gradient_sink.h"
#include "rlhf/tensor/buffer.h"

namespace rlhf {

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

  /// Where passes add the gradient of element `i` of the flat buffer. Neighbours in one part are neighbours
  /// here.
  float* address(std::size_t i);
  void layer_done(std::int64_t layer) override;
  void pass_done() override;
  void skip_pass() override;

  Collective& ranks() const { return ranks_; }
  /// Place of this rank's slice in the flat buffer.
  const Slice& place() const { return slice_; }
  /// This rank's slice, summed over all ranks and the passes since it was zero.
  std::span<float> values() { return {sums_.data(), sums_.size()}; }
  void zero();
  std::size_t bytes() const { return sums_.bytes() + layer_.bytes() + rest_.bytes(); }

 private:
  void add_sums(const std::vector<Slice>& part, Buffer<float>& buffer);

  GradientParts parts_;
  Collective& ranks_;
  std::size_t count_;
  Slice slice_;
  Buffer<float> sums_, layer_, rest_;
};

}  // namespace rlhf

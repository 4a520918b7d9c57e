#pragma once

#include <cstdint>

namespace rlhf {

/// Is told by backward passes what part of the gradient is complete, and may take it out of its place: each
/// pass then adds to zeros.
class GradientSink {
 public:
  virtual ~GradientSink() = default;

  /// The pass has added all that it has to the gradient of this layer. Layers come in descending order.
  virtual void layer_done(std::int64_t layer) = 0;
  /// The pass is over: the rest is complete, too.
  virtual void pass_done() = 0;
  /// Does for a pass that has nothing to add what the calls of a pass do.
  virtual void skip_pass() = 0;
};

}  // namespace rlhf

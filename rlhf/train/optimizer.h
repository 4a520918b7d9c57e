#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <span>

#include "rlhf/distributed/collective.h"
#include "rlhf/kernels/adamw.h"
#include "rlhf/kernels/ops.h"
#include "rlhf/model/parameters.h"
#include "rlhf/ppo/options.h"
#include "rlhf/tensor/mirrored.h"
#include "rlhf/train/moment_stream.h"

namespace rlhf {

/// One declaration of the optimizer's options for all stages.
using OptimizerOptions = ppo::OptimizerOptions;

/// Where the moments of a model on an accelerator are. On the CPU it makes no difference.
struct MomentPlacement {
  bool on_host = false;  ///< they pass through the device in pieces, at every step
  std::size_t piece_elements = std::size_t{8} << 20;

  /// Bytes on the device of the moments of `elements` weights.
  std::size_t device_bytes(std::size_t elements) const {
    return 2 * sizeof(float) *
           (on_host ? std::min(elements, MomentStream::kPlaces * piece_elements) : elements);
  }
};

/// AdamW over the flat trainable buffer of one model, in one pass. Scalar type T as the model's.
///
/// With several ranks each holds the moments of its slice alone and updates that (ZeRO stage 1, Rajbhandari
/// et al. 2020): gradients are summed to the slices' ranks, unless passes have done that
/// (Parameters::slice_gradient), and new weights are gathered from them. A model on an accelerator is updated
/// there, with moments there, and the rounded weights are what is gathered.
template <class T>
class Optimizer {
 public:
  /// @param collective of the ranks that call every function together; must outlive this
  Optimizer(const OptimizerOptions& options, std::size_t num_elements, Collective& collective = one_process(),
            MomentPlacement moments = {});

  struct StepResult {
    double gradient_norm = 0;  ///< before clipping
    bool skipped = false;      ///< the norm was not finite: weights and moments are unchanged
  };
  /// Updates the weights with `gradient_scale` times the sum of all ranks' gradients and zeroes the gradient.
  StepResult step(const Compute<T>& compute, Parameters<T>& parameters, double learning_rate,
                  double gradient_scale = 1);

  const OptimizerOptions& options() const { return options_; }
  std::int64_t num_steps() const { return steps_; }
  /// Of the moments, all of this rank's.
  std::size_t bytes() const { return first_.bytes() + second_.bytes(); }
  /// Of the moments, as far as they take the memory of the device that the model is on.
  std::size_t bytes_on(const Accelerator* accelerator) const {
    return accelerator ? moments_.device_bytes(first_.size()) : bytes();
  }

  std::size_t num_elements() const { return num_elements_; }
  /// State for checkpoints: of this rank's slice. Ask again before every use.
  std::span<T> first_moment() { return on_host(first_); }
  std::span<T> second_moment() { return on_host(second_); }
  void set_num_steps(std::int64_t steps) { steps_ = steps; }

 private:
  std::span<T> own_gradient(Parameters<T>& parameters);
  StepResult step_on_device(ResidentWeights& weights, double learning_rate, double gradient_scale);
  void update(ResidentWeights& weights, const float* gradient, const kernels::AdamwFactors& factors,
              const double* scale);
  MomentStream& stream(DeviceMemory& memory);
  kernels::AdamwFactors next_factors(double learning_rate);
  std::span<T> on_host(Mirrored<T>& moment) {
    if (stream_) stream_->wait();
    return moment.host();
  }

  OptimizerOptions options_;
  Collective& collective_;
  std::size_t num_elements_;
  Slice slice_;
  MomentPlacement moments_;
  Mirrored<T> first_, second_;
  std::optional<MomentStream> stream_;  ///< of both moments, where they stay on the host
  Buffer<double> numbers_;              ///< of a step on an accelerator
  std::int64_t steps_ = 0;
};

}  // namespace rlhf

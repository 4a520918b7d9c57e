#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <type_traits>
#include <vector>

#include "rlhf/model/decoder.h"
#include "rlhf/model/device_head.h"
#include "rlhf/model/host_head.h"
#include "rlhf/model/token_target.h"

namespace rlhf {

/// What a forward pass keeps of each trained layer for backward.
enum class Recompute {
  kNone,    ///< all that backward needs
  kLayers,  ///< its input; the rest is computed again, with the same bits: a third more work
};

/// What the memory of a pass depends on.
struct PassShape {
  std::int64_t rows = 0;     ///< tokens, common heads counted once
  std::int64_t blocks = 0;   ///< K/V blocks of the rows
  std::int64_t targets = 0;  ///< tokens whose log-probs are asked

  /// The largest pass of at most `tokens` rows and `sequences` sequences: each begins and ends a block.
  static PassShape at_most(std::int64_t tokens, std::int64_t sequences);
  static PassShape of(const PackedRows& rows, std::size_t targets);
  bool operator==(const PassShape&) const = default;
};

/// Whether backward may follow a forward pass.
enum class PassKeep { kNothing, kForBackward };

/// Forward (and backward) of whole sequences without a cache: scoring and training. Keeps activations of the
/// last `forward` until the next one. One per lane; buffers are reused.
///
/// A pass of floats whose Compute has an accelerator runs there, on the weights' resident copies: it hands
/// all calls to a pass of Bfloat16. Then hidden states and trunk cannot be looked at from the host.
template <class T>
class SequencePass {
 public:
  /// What comes in and out on the host.
  using Value = Wide<T>;
  using HostCompute = Compute<Value>;

  /// @param buffers where its memory comes from; null = the process's own, or the accelerator's
  SequencePass(const ModelConfig& config, HostCompute compute, Recompute recompute = Recompute::kNone,
               DeviceMemory* buffers = nullptr);

  Recompute recompute() const { return recompute_; }

  /// Runs `rows` through the layers that `weights` does not train (all layers when nothing is trained) and
  /// keeps the result, so that models that share this trunk (actor, critic, reference) can each run `forward`
  /// from it.
  /// @param last_layer layers [0, last_layer) are run.
  void run_trunk(const DecoderWeights<T>& weights, const PackedRows& rows, std::int64_t last_layer);
  /// The trunk's result [T, D], to be kept for a later pass over the same tokens; on the CPU only.
  const T* trunk() const { return trunk_.data(); }
  /// Instead of run_trunk: takes the trunk's result from where it was kept. `rows[t]` points to the D values
  /// of row t. On the CPU only.
  void restore_trunk(std::span<const T* const> rows, std::int64_t last_layer);
  /// Hidden states after the final norm, [T, D]; valid until the next call. Starts from the trunk when
  /// run_trunk was called for these rows, from the embedding otherwise. Null where the pass runs on an
  /// accelerator.
  using Keep = PassKeep;
  const T* forward(const DecoderWeights<T>& weights, const PackedRows& rows, Keep keep);
  /// Forgets the trunk's result: the next forward starts from the embedding.
  void drop_trunk();

  /// Log-probability (and entropy unless empty) of each target at a temperature, from the last forward.
  /// Logits exist only for chunks of targets.
  void token_logprobs(const DecoderWeights<T>& weights, std::span<const TokenTarget> targets,
                      double temperature, std::span<Value> logprobs, std::span<Value> entropies);
  /// Adds the gradient of sum(dlogprob * logprob + dentropy * entropy) to the head's gradient and to the
  /// gradient of the hidden states. `dentropies` may be empty.
  void token_logprobs_backward(const DecoderWeights<T>& weights, std::span<const TokenTarget> targets,
                               double temperature, std::span<const Value> dlogprobs,
                               std::span<const Value> dentropies);
  /// Log-probabilities of the whole vocabulary at temperature 1 after each row, [rows, V]; at most a few
  /// dozen rows, from the last forward.
  void log_distributions(const DecoderWeights<T>& weights, std::span<const std::int64_t> rows,
                         std::span<Value> out);
  using ToGradient = DistributionGradient<Value>;
  /// Adds the gradient of a loss of whole distributions after `rows` to the head's gradient and to that of
  /// the hidden states; after a forward that is kept for backward.
  void distributions_backward(const DecoderWeights<T>& weights, std::span<const std::int64_t> rows,
                              const ToGradient& to_gradient);
  /// Outputs of a score head at the given rows, row by row: its first `values.size() / rows.size()` labels.
  void scalar_outputs(const DecoderWeights<T>& weights, std::span<const std::int64_t> rows,
                      std::span<Value> values);
  void scalar_outputs_backward(const DecoderWeights<T>& weights, std::span<const std::int64_t> rows,
                               std::span<const Value> dvalues);
  /// Backward through final norm and trained layers of the gradient that the heads' backward calls have
  /// collected; adds to the weights' gradients.
  void backward(const DecoderWeights<T>& weights, const PackedRows& rows);
  /// In place of a backward pass, where this rank has no rows for one and others have: ranks that hold slices
  /// of a gradient (Parameters::slice_gradient) all take part in every pass. Does nothing elsewhere.
  void skip_backward(const DecoderWeights<T>& weights);

  /// Bytes that a pass takes when the activations of `kept_layers` layers are kept for backward (0 = it only
  /// scores). Adapters' few numbers a row are left out.
  static std::size_t activation_bytes(const ModelConfig& config, const PassShape& shape,
                                      std::int64_t kept_layers, Recompute recompute = Recompute::kNone);
  /// The same of this pass, where it runs.
  std::size_t predicted_bytes(const PassShape& shape, std::int64_t kept_layers) const;
  /// As DecoderRunner::matmul_flops.
  double matmul_flops() const { return on_device_ ? on_device_->matmul_flops() : runner_.matmul_flops(); }
  /// Bytes held now: those of the largest passes so far, buffer by buffer.
  std::size_t held_bytes() const;
  /// Gives all buffers back; what the last forward has kept is lost.
  void release();

 private:
  using Head = std::conditional_t<std::is_same_v<T, Bfloat16>, DeviceHead, HostHead<T>>;

  void forward_trained_layers(const DecoderWeights<T>& weights, const PackedRows& packed, std::int64_t first);
  void backward_trained_layers(const DecoderWeights<T>& weights, const PackedRows& packed,
                               std::int64_t first);

  ModelConfig config_;
  Recompute recompute_;
  std::unique_ptr<SequencePass<Bfloat16>> on_device_;  ///< does all the work when it is there
  DeviceOps<T> ops_;
  DecoderRunner<T> runner_;
  Head head_;
  KvStore<T> trunk_store_, store_;
  std::int64_t store_layers_ = 0;
  std::vector<LayerActivations<T>> activations_;
  std::vector<Buffer<T>> inputs_;  ///< of the trained layers, where their activations are not kept
  Buffer<T> trunk_, x_, layer_x_, hidden_, dx_;
  Buffer<Value> mean_, rstd_;
  std::int64_t trunk_layer_ = -1, num_rows_ = 0;
};

}  // namespace rlhf

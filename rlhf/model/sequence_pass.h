#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "rlhf/model/decoder.h"

namespace rlhf {

/// One token whose log-probability is asked: the hidden state of `row` predicts `target`.
struct TokenTarget {
  std::int64_t row = 0;
  TokenId target = 0;
};

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

/// Forward (and backward) of whole sequences without a cache: scoring and training. Keeps activations of the
/// last `forward` until the next one. One per lane; buffers are reused.
template <class T>
class SequencePass {
 public:
  /// @param buffers where its memory comes from; null = the process's own
  SequencePass(const ModelConfig& config, Compute<T> compute, Recompute recompute = Recompute::kNone,
               DeviceMemory* buffers = nullptr);

  Recompute recompute() const { return recompute_; }

  /// Runs `rows` through the layers that `weights` does not train (all layers when nothing is trained) and
  /// keeps the result, so that models that share this trunk (actor, critic, reference) can each run `forward`
  /// from it.
  /// @param last_layer layers [0, last_layer) are run.
  void run_trunk(const DecoderWeights<T>& weights, const PackedRows& rows, std::int64_t last_layer);
  /// The trunk's result [T, D], to be kept for a later pass over the same tokens.
  const T* trunk() const { return trunk_.data(); }
  /// Instead of run_trunk: takes the trunk's result from where it was kept. `rows[t]` points to the D values
  /// of row t.
  void restore_trunk(std::span<const T* const> rows, std::int64_t last_layer);
  /// Hidden states after the final norm, [T, D]; valid until the next call. Starts from the trunk when
  /// run_trunk was called for these rows, from the embedding otherwise. With `keep`, backward may follow.
  enum class Keep { kNothing, kForBackward };
  const T* forward(const DecoderWeights<T>& weights, const PackedRows& rows, Keep keep);
  /// Forgets the trunk's result: the next forward starts from the embedding.
  void drop_trunk() { trunk_layer_ = -1; }

  /// Log-probability (and entropy unless empty) of each target at a temperature, from the last forward.
  /// Logits exist only for chunks of targets.
  void token_logprobs(const DecoderWeights<T>& weights, std::span<const TokenTarget> targets,
                      double temperature, std::span<T> logprobs, std::span<T> entropies);
  /// Adds the gradient of sum(dlogprob * logprob + dentropy * entropy) to the head's gradient and to the
  /// gradient of the hidden states. `dentropies` may be empty.
  void token_logprobs_backward(const DecoderWeights<T>& weights, std::span<const TokenTarget> targets,
                               double temperature, std::span<const T> dlogprobs,
                               std::span<const T> dentropies);
  /// Log-probabilities of the whole vocabulary at temperature 1 after each row, [rows, V]; at most a few
  /// dozen rows, from the last forward.
  void log_distributions(const DecoderWeights<T>& weights, std::span<const std::int64_t> rows,
                         std::span<T> out);
  /// Gets the log-probabilities [V] at temperature 1 of row `i` of those asked and sets `gradient` [V], d
  /// loss / d logits. Called for several rows at once, from the threads of the pass.
  using ToGradient = std::function<void(std::size_t i, std::span<const T> log_probs, std::span<T> gradient)>;
  /// Adds the gradient of a loss of whole distributions after `rows` to the head's gradient and to that of
  /// the hidden states; after a forward that is kept for backward.
  void distributions_backward(const DecoderWeights<T>& weights, std::span<const std::int64_t> rows,
                              const ToGradient& to_gradient);
  /// Outputs of a score head at the given rows, row by row: its first `values.size() / rows.size()` labels.
  void scalar_outputs(const DecoderWeights<T>& weights, std::span<const std::int64_t> rows,
                      std::span<T> values);
  void scalar_outputs_backward(const DecoderWeights<T>& weights, std::span<const std::int64_t> rows,
                               std::span<const T> dvalues);
  /// Backward through final norm and trained layers of the gradient that the heads' backward calls have
  /// collected; adds to the weights' gradients.
  void backward(const DecoderWeights<T>& weights, const PackedRows& rows);

  /// Bytes that a pass takes when the activations of `kept_layers` layers are kept for backward (0 = it only
  /// scores). Adapters' few numbers a row are left out.
  static std::size_t activation_bytes(const ModelConfig& config, const PassShape& shape,
                                      std::int64_t kept_layers, Recompute recompute = Recompute::kNone);
  /// As DecoderRunner::matmul_flops.
  double matmul_flops() const { return runner_.matmul_flops(); }
  /// Bytes held now: those of the largest passes so far, buffer by buffer.
  std::size_t held_bytes() const;
  /// Gives all buffers back; what the last forward has kept is lost.
  void release();

 private:
  std::int64_t chunk_rows() const;
  void add_logits_gradient(const DecoderWeights<T>& weights, std::span<const TokenTarget> chunk);
  void chunk_logits(const DecoderWeights<T>& weights, std::span<const TokenTarget> chunk);
  template <class Fn>
  void for_logits_chunks(const DecoderWeights<T>& weights, std::span<const std::int64_t> rows, const Fn& fn);
  void clear_hidden_gradient();
  void forward_trained_layers(const DecoderWeights<T>& weights, const PackedRows& rows, std::int64_t first);
  void backward_trained_layers(const DecoderWeights<T>& weights, const PackedRows& rows, std::int64_t first);

  ModelConfig config_;
  Recompute recompute_;
  DeviceMemory* buffers_;
  DecoderRunner<T> runner_;
  KvStore<T> trunk_store_, store_;
  std::int64_t store_layers_ = 0;
  std::vector<LayerActivations<T>> activations_;
  std::vector<Buffer<T>> inputs_;  ///< of the trained layers, where their activations are not kept
  Buffer<T> trunk_, x_, layer_x_, hidden_, mean_, rstd_, dhidden_, dx_;
  Buffer<T> gathered_, logits_, dgathered_;
  std::vector<kernels::LogitsRow> logits_rows_;
  const TokenTarget* cached_chunk_ = nullptr;  ///< targets whose logits are still in logits_
  std::int64_t trunk_layer_ = -1, num_rows_ = 0;
};

}  // namespace rlhf

#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "rlhf/model/decoder.h"
#include "rlhf/model/token_target.h"

namespace rlhf {

/// What a pass on the CPU reads from the last hidden states: log-probabilities, distributions and scores, and
/// their gradients back to the hidden states. SequencePass explains the functions.
template <class T>
class HostHead {
 public:
  HostHead(const ModelConfig& config, DeviceOps<T> ops, const Compute<T>& compute);

  /// The hidden states [rows, D] that all else refers to.
  void begin(const T* hidden, std::int64_t rows, bool keeps_gradient);
  /// d loss / d hidden states [rows, D]: what the backward calls have collected since `begin`.
  const T* gradient() { return dhidden_.data(); }

  void token_logprobs(DecoderRunner<T>& runner, const DecoderWeights<T>& weights,
                      std::span<const TokenTarget> targets, double temperature, std::span<T> logprobs,
                      std::span<T> entropies);
  void token_logprobs_backward(DecoderRunner<T>& runner, const DecoderWeights<T>& weights,
                               std::span<const TokenTarget> targets, double temperature,
                               std::span<const T> dlogprobs, std::span<const T> dentropies);
  void log_distributions(DecoderRunner<T>& runner, const DecoderWeights<T>& weights,
                         std::span<const std::int64_t> rows, std::span<T> out);
  void distributions_backward(DecoderRunner<T>& runner, const DecoderWeights<T>& weights,
                              std::span<const std::int64_t> rows, const DistributionGradient<T>& to_gradient);
  void scalar_outputs(DecoderRunner<T>& runner, const DecoderWeights<T>& weights,
                      std::span<const std::int64_t> rows, std::span<T> values);
  void scalar_outputs_backward(DecoderRunner<T>& runner, const DecoderWeights<T>& weights,
                               std::span<const std::int64_t> rows, std::span<const T> dvalues);

  /// Targets whose logits exist at once.
  static std::int64_t chunk_rows(const ModelConfig& config);
  std::size_t held_bytes() const;
  void release();

 private:
  void chunk_logits(DecoderRunner<T>& runner, const DecoderWeights<T>& weights,
                    std::span<const TokenTarget> chunk);
  void add_logits_gradient(DecoderRunner<T>& runner, const DecoderWeights<T>& weights,
                           std::span<const TokenTarget> chunk);
  template <class Fn>
  void for_logits_chunks(DecoderRunner<T>& runner, const DecoderWeights<T>& weights,
                         std::span<const std::int64_t> rows, const Fn& fn);

  ModelConfig config_;
  DeviceOps<T> ops_;
  Compute<T> compute_;
  const T* hidden_ = nullptr;
  Buffer<T> dhidden_, gathered_, logits_, dgathered_;
  std::vector<kernels::LogitsRow> logits_rows_;
  const TokenTarget* cached_chunk_ = nullptr;  ///< targets whose logits are still in logits_
};

/// log_probs = log softmax(logits) [V], after the model's soft cap. Overwrites logits with the capped ones.
/// @return the log-sum-exp
template <class T>
double log_softmax(const Compute<T>& compute, std::span<T> logits, double softcap, std::span<T> log_probs);
/// Overwrites logits [V] of row `i` with d loss / d logits.
template <class T>
void distribution_gradient(const Compute<T>& compute, std::size_t i, std::span<T> logits, double softcap,
                           const DistributionGradient<T>& to_gradient);
/// @throws InvalidArgument when `room` numbers are not rows * V
void check_distributions(std::size_t rows, std::int64_t V, std::size_t room);

/// Labels of a score head that are asked at each row, for `values` numbers. @throws InvalidArgument when they
/// do not fit
template <class T>
std::int64_t num_labels(const DecoderWeights<T>& weights, std::size_t rows, std::size_t values);

}  // namespace rlhf

#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "rlhf/model/decoder.h"
#include "rlhf/model/token_target.h"
#include "rlhf/tensor/staging.h"

namespace rlhf {

/// HostHead on an accelerator. Logits and gradients of hidden states are summed in float; only statistics and
/// scores come back. Whole distributions are worked on by the host.
class DeviceHead {
 public:
  using T = Bfloat16;
  DeviceHead(const ModelConfig& config, DeviceOps<T> ops, const Compute<float>& compute);

  void begin(const T* hidden, std::int64_t rows, bool keeps_gradient);
  const T* gradient();

  void token_logprobs(DecoderRunner<T>& runner, const DecoderWeights<T>& weights,
                      std::span<const TokenTarget> targets, double temperature, std::span<float> logprobs,
                      std::span<float> entropies);
  void token_logprobs_backward(DecoderRunner<T>& runner, const DecoderWeights<T>& weights,
                               std::span<const TokenTarget> targets, double temperature,
                               std::span<const float> dlogprobs, std::span<const float> dentropies);
  void log_distributions(DecoderRunner<T>& runner, const DecoderWeights<T>& weights,
                         std::span<const std::int64_t> rows, std::span<float> out);
  void distributions_backward(DecoderRunner<T>& runner, const DecoderWeights<T>& weights,
                              std::span<const std::int64_t> rows,
                              const DistributionGradient<float>& to_gradient);
  void scalar_outputs(DecoderRunner<T>& runner, const DecoderWeights<T>& weights,
                      std::span<const std::int64_t> rows, std::span<float> values);
  void scalar_outputs_backward(DecoderRunner<T>& runner, const DecoderWeights<T>& weights,
                               std::span<const std::int64_t> rows, std::span<const float> dvalues);

  static std::int64_t chunk_rows(const ModelConfig& config);
  std::size_t held_bytes() const;
  void release();

 private:
  void gather(std::span<const std::int64_t> rows);
  void chunk_logits(const DecoderWeights<T>& weights, std::span<const TokenTarget> chunk);
  void add_logits_gradient(DecoderRunner<T>& runner, const DecoderWeights<T>& weights);
  void add_gathered_gradient(DecoderRunner<T>& runner);
  template <class Fn>
  void for_host_logits(const DecoderWeights<T>& weights, std::span<const std::int64_t> rows, const Fn& fn);

  ModelConfig config_;
  DeviceOps<T> ops_;
  Compute<float> compute_;
  Staging chunk_, gradients_;  ///< rows and targets of a chunk; what is known of its loss
  Staging::Place<std::int64_t> staged_rows_;
  Staging::Place<TokenId> staged_targets_;
  std::vector<std::int64_t> gathered_rows_;
  const T* hidden_ = nullptr;
  std::int64_t num_rows_ = 0;
  Buffer<T> dhidden_, gathered_, dgathered_, narrow_;  ///< narrow_: a gradient in front of a product
  Buffer<float> dhidden_sums_, logits_;
  Buffer<kernels::LogitsRow> statistics_;
  Buffer<double> workspace_;  ///< of statistics
  std::size_t num_statistics_ = 0;
  std::vector<float> host_logits_;
  const TokenTarget* cached_chunk_ = nullptr;  ///< targets whose logits are still in logits_
};

}  // namespace rlhf

#pragma once

#include <cstdint>
#include <deque>

#include "rlhf/kernels/packed_matrix.h"
#include "rlhf/model/decoder_weights.h"

namespace rlhf {

/// The weights of a decoder as generation reads them: every projection and the head in bf16 or int8, all else
/// (embedding, positions, norms, biases, adapters) where it lies in the source. The embedding of a tied model
/// is gathered from the source, its head is packed.
///
/// Not thread-safe: `refresh` may not run while the weights are read.
class RolloutWeights {
 public:
  /// Packs everything. @param source what is packed; must outlive this object
  /// @param learning weights of the same shape whose gradient pointers say what changes between two calls of
  /// `refresh`: the source itself, or the model it is a copy of
  /// @throws InvalidArgument for fp32 or a scalar head
  RolloutWeights(WeightFormat format, const DecoderWeights<float>& source,
                 const DecoderWeights<float>& learning, const Compute<float>& compute);
  RolloutWeights(RolloutWeights&&) = default;

  /// Of this object's lifetime. For DecoderRunner<float> on the CPU, forward only.
  const DecoderWeights<float>& weights() const { return weights_; }
  WeightFormat format() const { return format_; }
  /// Packs again what learns. Call when the source has changed. @return bytes written
  std::uint64_t refresh(const Compute<float>& compute);
  /// Of the packed matrices.
  std::uint64_t bytes() const;
  /// What `bytes` is for a model of this shape; 0 for fp32.
  static std::uint64_t bytes(WeightFormat format, const ModelConfig& config);
  /// Most inputs of a projection: what QuantisedRows must hold for a row.
  static std::int64_t most_inputs(const ModelConfig& config);

 private:
  struct Matrix {
    const float* source;
    bool learns;
    PackedMatrix packed;
  };

  WeightFormat format_;
  DecoderWeights<float> weights_;
  std::deque<Matrix> matrices_;  ///< weights_ points into it
};

}  // namespace rlhf

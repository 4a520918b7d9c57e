#include "rlhf/model/rollout_weights.h"

#include <algorithm>

#include "rlhf/core/error.h"

namespace rlhf {
namespace {

// Calls `visit` for every matrix, in an order of its own for any weights of a shape.
template <class Weights, class Visit>
void for_projections(Weights& weights, const Visit& visit) {
  for (auto& layer : weights.layers) {
    visit(layer.qkv);
    visit(layer.out);
    visit(layer.gate_up);
    visit(layer.down);
  }
  visit(weights.head);
}

}  // namespace

RolloutWeights::RolloutWeights(WeightFormat format, const DecoderWeights<float>& source,
                               const DecoderWeights<float>& learning, const Compute<float>& compute)
    : format_(format), weights_(source) {
  RLHF_CHECK(!source.config.scalar_head, "rollout weights: a model with a scalar head generates nothing");
  for_projections(learning, [&](const LinearWeights<float>& w) {
    matrices_.push_back({nullptr, w.dweight != nullptr, PackedMatrix(format, w.N, w.K)});
  });
  auto matrix = matrices_.begin();
  for_projections(weights_, [&](LinearWeights<float>& w) {
    RLHF_CHECK(w.N == matrix->packed.N() && w.K == matrix->packed.K(),
               "rollout weights: source and learning weights differ in shape");
    matrix->source = w.weight;
    matrix->packed.pack(compute, w.weight);
    w.packed = &matrix->packed;
    ++matrix;
  });
}

std::uint64_t RolloutWeights::refresh(const Compute<float>& compute) {
  std::uint64_t written = 0;
  for (Matrix& matrix : matrices_) {
    if (!matrix.learns) continue;
    matrix.packed.pack(compute, matrix.source);
    written += matrix.packed.bytes();
  }
  return written;
}

std::uint64_t RolloutWeights::bytes() const {
  std::uint64_t total = 0;
  for (const Matrix& matrix : matrices_) total += matrix.packed.bytes();
  return total;
}

std::uint64_t RolloutWeights::bytes(WeightFormat format, const ModelConfig& config) {
  const std::int64_t D = config.hidden_size, F = config.intermediate_size, Q = config.query_width();
  const auto of = [&](std::int64_t N, std::int64_t K) { return PackedMatrix::bytes(format, N, K); };
  const std::uint64_t layer =
      of(Q + 2 * config.kv_width(), D) + of(D, Q) + of(config.gated_mlp ? 2 * F : F, D) + of(D, F);
  return static_cast<std::uint64_t>(config.num_layers) * layer + of(config.vocab_size, D);
}

std::int64_t RolloutWeights::most_inputs(const ModelConfig& config) {
  return std::max({config.hidden_size, config.query_width(), config.intermediate_size});
}

}  // namespace rlhf

#include "rlhf/model/sequence_pass.h"

#include <algorithm>

#include "rlhf/core/error.h"
#include "rlhf/kernels/accelerator.h"
#include "rlhf/model/gradient_sink.h"
#include "rlhf/model/resident_weights.h"

namespace rlhf {
namespace {

template <class T>
DeviceOps<T> make_ops(const Compute<Wide<T>>& compute, DeviceMemory* buffers) {
  if constexpr (std::is_same_v<T, Bfloat16>) {
    const Accelerator& accelerator = *compute.accelerator();
    return {*accelerator.kernels, *accelerator.memory, buffers};
  } else {
    return DeviceOps<T>(compute, buffers);
  }
}

}  // namespace

PassShape PassShape::at_most(std::int64_t tokens, std::int64_t sequences) {
  return {tokens, tokens / kernels::kBlockTokens + 2 * std::min(sequences, tokens), tokens};
}

PassShape PassShape::of(const PackedRows& rows, std::size_t targets) {
  return {rows.rows().size(), rows.num_blocks(), static_cast<std::int64_t>(targets)};
}

template <class T>
SequencePass<T>::SequencePass(const ModelConfig& config, HostCompute compute, Recompute recompute,
                              DeviceMemory* buffers)
    : config_(config),
      recompute_(recompute),
      ops_(make_ops<T>(compute, buffers)),
      runner_(config, ops_),
      head_(config, ops_, compute) {
  if constexpr (std::is_same_v<T, float>)
    if (compute.accelerator()) {
      on_device_ = std::make_unique<SequencePass<Bfloat16>>(config, compute, recompute, buffers);
      return;  // without buffers of its own
    }
  release();
}

// Hands a call to the pass on the accelerator, where there is one.
#define RLHF_ON_DEVICE(...)               \
  if constexpr (std::is_same_v<T, float>) \
    if (on_device_) return on_device_->__VA_ARGS__

template <class T>
void SequencePass<T>::drop_trunk() {
  RLHF_ON_DEVICE(drop_trunk());
  trunk_layer_ = -1;
}

template <class T>
void SequencePass<T>::run_trunk(const DecoderWeights<T>& weights, const PackedRows& packed,
                                std::int64_t last_layer) {
  RLHF_ON_DEVICE(run_trunk(resident_weights(weights), packed, last_layer));
  const std::int64_t rows = packed.rows().size();
  trunk_.reserve_discard(to_size(rows * config_.hidden_size));
  trunk_store_.reserve_discard(packed.num_blocks());
  runner_.embed(weights, packed.rows(), trunk_.data());
  for (std::int64_t l = 0; l < last_layer; ++l)
    runner_.forward_layers(weights, packed.rows(), l, l + 1, trunk_store_, l, trunk_.data(), nullptr);
  trunk_layer_ = last_layer;
}

template <class T>
void SequencePass<T>::restore_trunk(std::span<const T* const> rows, std::int64_t last_layer) {
  RLHF_CHECK(!on_device_ && !ops_.memory(), "restore_trunk: kept states are for passes on the CPU");
  const std::int64_t D = config_.hidden_size;
  trunk_.reserve_discard(rows.size() * to_size(D));
  for (std::size_t t = 0; t < rows.size(); ++t)
    std::copy_n(rows[t], D, trunk_.data() + static_cast<std::int64_t>(t) * D);
  trunk_layer_ = last_layer;
}

template <class T>
const T* SequencePass<T>::forward(const DecoderWeights<T>& weights, const PackedRows& packed, Keep keep) {
  if constexpr (std::is_same_v<T, float>)
    if (on_device_) {
      on_device_->forward(resident_weights(weights), packed, keep);
      return nullptr;
    }
  const std::int64_t rows = packed.rows().size(), D = config_.hidden_size, L = config_.num_layers;
  num_rows_ = rows;
  const std::int64_t first = weights.first_trainable_layer;
  const bool from_trunk = trunk_layer_ >= 0;
  RLHF_CHECK(!from_trunk || keep == Keep::kNothing || first >= trunk_layer_, "forward: layer ", first,
             " is trained but the shared trunk reaches to layer ", trunk_layer_);
  x_.reserve_discard(to_size(rows * D));
  hidden_.reserve_discard(to_size(rows * D));
  mean_.reserve_discard(to_size(rows));
  rstd_.reserve_discard(to_size(rows));
  if (from_trunk)
    ops_.copy(x_.data(), trunk_.data(), rows * D);
  else
    runner_.embed(weights, packed.rows(), x_.data());
  const std::int64_t begin = from_trunk ? trunk_layer_ : 0;
  const std::int64_t kept_from = keep == Keep::kForBackward ? std::min(first, L) : L;
  trunk_store_.reserve_discard(packed.num_blocks());
  for (std::int64_t l = begin; l < kept_from; ++l)
    runner_.forward_layers(weights, packed.rows(), l, l + 1, trunk_store_, l, x_.data(), nullptr);
  if (kept_from < L) forward_trained_layers(weights, packed, kept_from);
  runner_.final_norm(weights, rows, x_.data(), hidden_.data(), mean_.data(), rstd_.data());
  head_.begin(hidden_.data(), rows, keep == Keep::kForBackward);
  return hidden_.data();
}

// Layers [first, L) on x_, so that backward may follow.
template <class T>
void SequencePass<T>::forward_trained_layers(const DecoderWeights<T>& weights, const PackedRows& packed,
                                             std::int64_t first) {
  const std::int64_t L = config_.num_layers, elements = packed.rows().size() * config_.hidden_size;
  const std::int64_t stored = recompute_ == Recompute::kLayers ? 1 : L - first;
  if (store_layers_ != stored) {
    store_layers_ = stored;
    store_ = KvStore<T>(config_, stored, packed.num_blocks(), ops_.buffers());
  }
  store_.reserve_discard(packed.num_blocks());
  if (recompute_ == Recompute::kNone)
    return runner_.forward_layers(weights, packed.rows(), first, L, store_, first, x_.data(), &activations_);
  while (inputs_.size() < to_size(L - first)) inputs_.emplace_back(0, ops_.buffers());
  for (std::int64_t l = first; l < L; ++l) {
    Buffer<T>& input = inputs_[to_size(l - first)];
    input.reserve_discard(to_size(elements));
    ops_.copy(input.data(), x_.data(), elements);
    runner_.forward_layers(weights, packed.rows(), l, l + 1, store_, l, x_.data(), nullptr);
  }
}

// Backward of layers [first, L) on dx_.
template <class T>
void SequencePass<T>::backward_trained_layers(const DecoderWeights<T>& weights, const PackedRows& packed,
                                              std::int64_t first) {
  const std::int64_t L = config_.num_layers, elements = packed.rows().size() * config_.hidden_size;
  if (recompute_ == Recompute::kNone)
    return runner_.backward_layers(weights, packed, first, L, store_, first, dx_.data(), activations_);
  layer_x_.reserve_discard(to_size(elements));
  for (std::int64_t l = L - 1; l >= first; --l) {
    ops_.copy(layer_x_.data(), inputs_[to_size(l - first)].data(), elements);
    runner_.forward_layers(weights, packed.rows(), l, l + 1, store_, l, layer_x_.data(), &activations_);
    runner_.backward_layers(weights, packed, l, l + 1, store_, l, dx_.data(), activations_);
  }
}

template <class T>
void SequencePass<T>::token_logprobs(const DecoderWeights<T>& weights, std::span<const TokenTarget> targets,
                                     double temperature, std::span<Value> logprobs,
                                     std::span<Value> entropies) {
  RLHF_ON_DEVICE(token_logprobs(resident_weights(weights), targets, temperature, logprobs, entropies));
  head_.token_logprobs(runner_, weights, targets, temperature, logprobs, entropies);
}

template <class T>
void SequencePass<T>::token_logprobs_backward(const DecoderWeights<T>& weights,
                                              std::span<const TokenTarget> targets, double temperature,
                                              std::span<const Value> dlogprobs,
                                              std::span<const Value> dentropies) {
  RLHF_ON_DEVICE(
      token_logprobs_backward(resident_weights(weights), targets, temperature, dlogprobs, dentropies));
  head_.token_logprobs_backward(runner_, weights, targets, temperature, dlogprobs, dentropies);
}

template <class T>
void SequencePass<T>::log_distributions(const DecoderWeights<T>& weights, std::span<const std::int64_t> rows,
                                        std::span<Value> out) {
  RLHF_ON_DEVICE(log_distributions(resident_weights(weights), rows, out));
  head_.log_distributions(runner_, weights, rows, out);
}

template <class T>
void SequencePass<T>::distributions_backward(const DecoderWeights<T>& weights,
                                             std::span<const std::int64_t> rows,
                                             const ToGradient& to_gradient) {
  RLHF_ON_DEVICE(distributions_backward(resident_weights(weights), rows, to_gradient));
  head_.distributions_backward(runner_, weights, rows, to_gradient);
}

template <class T>
void SequencePass<T>::scalar_outputs(const DecoderWeights<T>& weights, std::span<const std::int64_t> rows,
                                     std::span<Value> values) {
  RLHF_ON_DEVICE(scalar_outputs(resident_weights(weights), rows, values));
  head_.scalar_outputs(runner_, weights, rows, values);
}

template <class T>
void SequencePass<T>::scalar_outputs_backward(const DecoderWeights<T>& weights,
                                              std::span<const std::int64_t> rows,
                                              std::span<const Value> dvalues) {
  RLHF_ON_DEVICE(scalar_outputs_backward(resident_weights(weights), rows, dvalues));
  head_.scalar_outputs_backward(runner_, weights, rows, dvalues);
}

template <class T>
void SequencePass<T>::backward(const DecoderWeights<T>& weights, const PackedRows& packed) {
  RLHF_ON_DEVICE(backward(resident_weights(weights), packed));
  const std::int64_t rows = num_rows_, D = config_.hidden_size, first = weights.first_trainable_layer;
  dx_.reserve_discard(to_size(rows * D));
  ops_.zero(dx_.data(), to_size(rows * D) * sizeof(T));
  ops_.norm_grad({head_.gradient(), x_.data(), weights.final_norm.weight, mean_.data(), rstd_.data(),
                  dx_.data(), weights.final_norm.dweight, weights.final_norm.dbias, rows, D,
                  config_.norm == NormKind::kLayer, config_.norm_plus_one});
  if (first < config_.num_layers) {
    backward_trained_layers(weights, packed, first);
    if (weights.embedding_trainable) runner_.backward_embed(weights, packed.rows(), dx_.data());
  }
  if (weights.gradient_sink) weights.gradient_sink->pass_done();
}

template <class T>
void SequencePass<T>::skip_backward(const DecoderWeights<T>& weights) {
  RLHF_ON_DEVICE(skip_backward(resident_weights(weights)));
  if (weights.gradient_sink) weights.gradient_sink->skip_pass();
}

template <class T>
std::size_t SequencePass<T>::activation_bytes(const ModelConfig& config, const PassShape& shape,
                                              std::int64_t kept_layers, Recompute recompute) {
  const std::int64_t D = config.hidden_size, q = config.query_width(), kv = config.kv_width();
  const std::int64_t qkv = q + 2 * kv, F = config.intermediate_size, M = config.gated_mlp ? 2 * F : F;
  const bool trains = kept_layers > 0, on_device = std::is_same_v<T, Bfloat16>;
  // Trunk, residual stream, normed states and the scratch of one layer's forward.
  std::int64_t per_row = 4 * D + qkv + q + M + F + (config.post_norms ? D : 0), wide_per_row = 2;
  if (trains) {  // gradients
    per_row += 3 * D + qkv + q + M + F + (config.post_norms ? D : 0);
    wide_per_row += (config.post_norms ? 1 : 0) + (on_device ? D : 0);
  }
  const std::int64_t per_layer =
      2 * D + 2 * q + M + (config.qk_norm ? qkv : 0) + (config.post_norms ? 2 * D : 0);
  const std::int64_t wide_per_layer = config.num_heads + 4;
  const std::int64_t per_block = 2 * kv * kernels::kBlockTokens;
  const bool again = trains && recompute == Recompute::kLayers;
  if (again) per_row += (kept_layers + 1) * D;  // the layers' inputs, and the one that is computed again
  const std::int64_t whole_layers = again ? 1 : kept_layers;
  // K/V of one frozen layer at a time, of all layers that are there as a whole, and the gradient of one.
  const std::int64_t stored_layers = 1 + whole_layers;
  const std::int64_t chunk = std::min(shape.targets, Head::chunk_rows(config));
  const std::int64_t rope = config.learned_positions ? 0 : std::max<std::int64_t>(256, shape.rows);
  const std::int64_t elements =
      shape.rows * (per_row + whole_layers * per_layer) + shape.blocks * per_block * stored_layers +
      chunk * ((trains ? 2 : 1) * D + (trains && on_device ? config.vocab_size : 0));
  const std::int64_t wide = shape.rows * (wide_per_row + whole_layers * wide_per_layer) +
                            (trains ? shape.blocks * per_block : 0) + chunk * config.vocab_size +
                            rope * config.head_dim;
  return to_size(elements) * sizeof(T) + to_size(wide) * sizeof(Value);
}

template <class T>
std::size_t SequencePass<T>::predicted_bytes(const PassShape& shape, std::int64_t kept_layers) const {
  if (on_device_) return on_device_->predicted_bytes(shape, kept_layers);
  return activation_bytes(config_, shape, kept_layers, recompute_);
}

template <class T>
std::size_t SequencePass<T>::held_bytes() const {
  if (on_device_) return on_device_->held_bytes();
  std::size_t total = trunk_store_.bytes() + store_.bytes() + head_.held_bytes() + runner_.scratch_bytes();
  for (const Buffer<T>* b : {&trunk_, &x_, &layer_x_, &hidden_, &dx_}) total += b->bytes();
  for (const Buffer<Value>* b : {&mean_, &rstd_}) total += b->bytes();
  for (const Buffer<T>& b : inputs_) total += b.bytes();
  for (const LayerActivations<T>& a : activations_) total += a.bytes();
  return total;
}

template <class T>
void SequencePass<T>::release() {
  if (on_device_) return on_device_->release();
  trunk_store_ = KvStore<T>(config_, 1, 0, ops_.buffers());
  store_ = {};
  store_layers_ = 0;
  activations_.clear();
  inputs_.clear();
  for (Buffer<T>* b : {&trunk_, &x_, &layer_x_, &hidden_, &dx_}) *b = Buffer<T>(0, ops_.buffers());
  for (Buffer<Value>* b : {&mean_, &rstd_}) *b = Buffer<Value>(0, ops_.buffers());
  head_.release();
  runner_.release_scratch();
  trunk_layer_ = -1;
}

template class SequencePass<float>;
template class SequencePass<double>;
template class SequencePass<Bfloat16>;

}  // namespace rlhf

#include "rlhf/model/sequence_pass.h"

#include <algorithm>

#include "rlhf/core/error.h"

namespace rlhf {
namespace {

// Logits of one chunk. 256 rows of a 49152-word vocabulary: large enough for efficient GEMMs and for the
// responses of most micro-batches, whose logits then need not be computed again in backward.
constexpr std::size_t kLogitsBytes = std::size_t{48} << 20;

// Targets whose logits exist at once.
template <class T>
std::int64_t logits_chunk_rows(const ModelConfig& config) {
  return std::max<std::int64_t>(8, static_cast<std::int64_t>(kLogitsBytes / sizeof(T)) / config.vocab_size);
}

}  // namespace

PassShape PassShape::at_most(std::int64_t tokens, std::int64_t sequences) {
  return {tokens, tokens / kernels::kBlockTokens + 2 * std::min(sequences, tokens), tokens};
}

PassShape PassShape::of(const PackedRows& rows, std::size_t targets) {
  return {rows.rows().size(), rows.num_blocks(), static_cast<std::int64_t>(targets)};
}

template <class T>
SequencePass<T>::SequencePass(const ModelConfig& config, Compute<T> compute, Recompute recompute,
                              DeviceMemory* buffers)
    : config_(config),
      recompute_(recompute),
      buffers_(buffers),
      runner_(config, DeviceOps<T>(compute, buffers)) {
  release();
}

template <class T>
std::int64_t SequencePass<T>::chunk_rows() const {
  return logits_chunk_rows<T>(config_);
}

template <class T>
void SequencePass<T>::run_trunk(const DecoderWeights<T>& weights, const PackedRows& packed,
                                std::int64_t last_layer) {
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
  const std::int64_t D = config_.hidden_size;
  trunk_.reserve_discard(rows.size() * to_size(D));
  for (std::size_t t = 0; t < rows.size(); ++t)
    std::copy_n(rows[t], D, trunk_.data() + static_cast<std::int64_t>(t) * D);
  trunk_layer_ = last_layer;
}

template <class T>
const T* SequencePass<T>::forward(const DecoderWeights<T>& weights, const PackedRows& packed, Keep keep) {
  const std::int64_t rows = packed.rows().size(), D = config_.hidden_size, L = config_.num_layers;
  num_rows_ = rows;
  cached_chunk_ = nullptr;
  const std::int64_t first = weights.first_trainable_layer;
  const bool from_trunk = trunk_layer_ >= 0;
  RLHF_CHECK(!from_trunk || keep == Keep::kNothing || first >= trunk_layer_, "forward: layer ", first,
             " is trained but the shared trunk reaches to layer ", trunk_layer_);
  x_.reserve_discard(to_size(rows * D));
  hidden_.reserve_discard(to_size(rows * D));
  mean_.reserve_discard(to_size(rows));
  rstd_.reserve_discard(to_size(rows));
  if (from_trunk)
    std::copy_n(trunk_.data(), rows * D, x_.data());
  else
    runner_.embed(weights, packed.rows(), x_.data());
  const std::int64_t begin = from_trunk ? trunk_layer_ : 0;
  const std::int64_t kept_from = keep == Keep::kForBackward ? std::min(first, L) : L;
  trunk_store_.reserve_discard(packed.num_blocks());
  for (std::int64_t l = begin; l < kept_from; ++l)
    runner_.forward_layers(weights, packed.rows(), l, l + 1, trunk_store_, l, x_.data(), nullptr);
  if (kept_from < L) forward_trained_layers(weights, packed, kept_from);
  runner_.final_norm(weights, rows, x_.data(), hidden_.data(), mean_.data(), rstd_.data());
  if (keep == Keep::kForBackward) clear_hidden_gradient();
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
    store_ = KvStore<T>(config_, stored, packed.num_blocks(), buffers_);
  }
  store_.reserve_discard(packed.num_blocks());
  if (recompute_ == Recompute::kNone)
    return runner_.forward_layers(weights, packed.rows(), first, L, store_, first, x_.data(), &activations_);
  while (inputs_.size() < to_size(L - first)) inputs_.emplace_back(0, buffers_);
  for (std::int64_t l = first; l < L; ++l) {
    Buffer<T>& input = inputs_[to_size(l - first)];
    input.reserve_discard(to_size(elements));
    std::copy_n(x_.data(), elements, input.data());
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
    std::copy_n(inputs_[to_size(l - first)].data(), elements, layer_x_.data());
    runner_.forward_layers(weights, packed.rows(), l, l + 1, store_, l, layer_x_.data(), &activations_);
    runner_.backward_layers(weights, packed, l, l + 1, store_, l, dx_.data(), activations_);
  }
}

template <class T>
void SequencePass<T>::clear_hidden_gradient() {
  dhidden_.reserve_discard(to_size(num_rows_ * config_.hidden_size));
  std::fill_n(dhidden_.data(), num_rows_ * config_.hidden_size, T(0));
}

template <class T>
void SequencePass<T>::chunk_logits(const DecoderWeights<T>& weights, std::span<const TokenTarget> chunk) {
  const std::int64_t n = static_cast<std::int64_t>(chunk.size()), D = config_.hidden_size,
                     V = config_.vocab_size;
  gathered_.reserve_discard(to_size(n * D));
  logits_.reserve_discard(to_size(n * V));
  for (std::int64_t i = 0; i < n; ++i) {
    RLHF_CHECK(chunk[to_size(i)].target >= 0 && chunk[to_size(i)].target < V, "token id ",
               chunk[to_size(i)].target, " is outside the vocabulary of ", V);
    std::copy_n(hidden_.data() + chunk[to_size(i)].row * D, D, gathered_.data() + i * D);
  }
  runner_.linear(weights.head, n, gathered_.data(), logits_.data(), false);
}

template <class T>
void SequencePass<T>::token_logprobs(const DecoderWeights<T>& weights, std::span<const TokenTarget> targets,
                                     double temperature, std::span<T> logprobs, std::span<T> entropies) {
  const std::int64_t V = config_.vocab_size, chunk = chunk_rows();
  logits_rows_.resize(targets.size());
  for (std::int64_t begin = 0; begin < static_cast<std::int64_t>(targets.size()); begin += chunk) {
    const auto part =
        targets.subspan(to_size(begin), std::min(to_size(chunk), targets.size() - to_size(begin)));
    chunk_logits(weights, part);
    runner_.compute().for_rows(static_cast<std::int64_t>(part.size()), 20 * V, [&](std::int64_t i) {
      const auto row = runner_.compute().table().logits_row(logits_.data() + i * V, V, 1 / temperature,
                                                            config_.final_softcap, part[to_size(i)].target);
      logits_rows_[to_size(begin + i)] = row;
      logprobs[to_size(begin + i)] = static_cast<T>(row.logprob);
      if (!entropies.empty()) entropies[to_size(begin + i)] = static_cast<T>(row.entropy);
    });
    cached_chunk_ = part.data();
  }
}

template <class T>
void SequencePass<T>::token_logprobs_backward(const DecoderWeights<T>& weights,
                                              std::span<const TokenTarget> targets, double temperature,
                                              std::span<const T> dlogprobs, std::span<const T> dentropies) {
  const std::int64_t V = config_.vocab_size, chunk = chunk_rows();
  RLHF_CHECK(logits_rows_.size() == targets.size(), "token_logprobs_backward: call token_logprobs first");
  // Last chunk first: its logits are still there.
  const std::int64_t count = static_cast<std::int64_t>(targets.size());
  for (std::int64_t begin = count == 0 ? -1 : (count - 1) / chunk * chunk; begin >= 0; begin -= chunk) {
    const auto part =
        targets.subspan(to_size(begin), std::min(to_size(chunk), targets.size() - to_size(begin)));
    const std::int64_t n = static_cast<std::int64_t>(part.size());
    const bool cached = cached_chunk_ == part.data();
    cached_chunk_ = nullptr;
    if (!cached) chunk_logits(weights, part);
    runner_.compute().for_rows(n, 20 * V, [&](std::int64_t i) {
      T* logits = logits_.data() + i * V;
      const auto& table = runner_.compute().table();
      if (!cached && config_.final_softcap > 0)
        table.logits_row(logits, V, 1 / temperature, config_.final_softcap, part[to_size(i)].target);
      table.logits_row_grad(logits, V, 1 / temperature, config_.final_softcap, part[to_size(i)].target,
                            logits_rows_[to_size(begin + i)],
                            static_cast<double>(dlogprobs[to_size(begin + i)]),
                            dentropies.empty() ? 0 : static_cast<double>(dentropies[to_size(begin + i)]));
    });
    add_logits_gradient(weights, part);
  }
}

// From d loss / d logits of a chunk, which is in logits_, to the head and the hidden states.
template <class T>
void SequencePass<T>::add_logits_gradient(const DecoderWeights<T>& weights,
                                          std::span<const TokenTarget> chunk) {
  const std::int64_t n = static_cast<std::int64_t>(chunk.size()), D = config_.hidden_size;
  dgathered_.reserve_discard(to_size(n * D));
  runner_.linear_backward(weights.head, n, gathered_.data(), logits_.data(), dgathered_.data(), false);
  for (std::int64_t i = 0; i < n; ++i)
    runner_.compute().table().add(dhidden_.data() + chunk[to_size(i)].row * D, dgathered_.data() + i * D, D);
}

// Calls fn(index of its first row, targets) for chunks of `rows` while their logits are in logits_.
template <class T>
template <class Fn>
void SequencePass<T>::for_logits_chunks(const DecoderWeights<T>& weights, std::span<const std::int64_t> rows,
                                        const Fn& fn) {
  std::vector<TokenTarget> targets;
  for (const std::int64_t row : rows) targets.push_back({row, 0});
  cached_chunk_ = nullptr;
  const auto chunk = to_size(chunk_rows());
  for (std::size_t begin = 0; begin < rows.size(); begin += chunk) {
    const auto part =
        std::span<const TokenTarget>(targets).subspan(begin, std::min(chunk, rows.size() - begin));
    chunk_logits(weights, part);
    fn(begin, part);
  }
}

template <class T>
void SequencePass<T>::distributions_backward(const DecoderWeights<T>& weights,
                                             std::span<const std::int64_t> rows,
                                             const ToGradient& to_gradient) {
  const std::int64_t V = config_.vocab_size;
  const double cap = config_.final_softcap;
  for_logits_chunks(weights, rows, [&](std::size_t begin, std::span<const TokenTarget> part) {
    runner_.compute().for_rows(static_cast<std::int64_t>(part.size()), 20 * V, [&](std::int64_t i) {
      T* logits = logits_.data() + i * V;
      const auto row = runner_.compute().table().logits_row(logits, V, 1, cap, 0);
      std::vector<T> log_probs(to_size(V));
      for (std::int64_t v = 0; v < V; ++v)
        log_probs[to_size(v)] = static_cast<T>(static_cast<double>(logits[v]) - row.lse);
      to_gradient(begin + to_size(i), log_probs, {logits, to_size(V)});
      if (cap <= 0) return;
      for (std::int64_t v = 0; v < V; ++v) {
        const double capped = (static_cast<double>(log_probs[to_size(v)]) + row.lse) / cap;
        logits[v] = static_cast<T>(static_cast<double>(logits[v]) * (1 - capped * capped));
      }
    });
    add_logits_gradient(weights, part);
  });
}

template <class T>
void SequencePass<T>::log_distributions(const DecoderWeights<T>& weights, std::span<const std::int64_t> rows,
                                        std::span<T> out) {
  const std::int64_t V = config_.vocab_size;
  RLHF_CHECK(out.size() == rows.size() * to_size(V), "log_distributions: room for ", out.size(),
             " numbers, needed ", rows.size() * to_size(V));
  for_logits_chunks(weights, rows, [&](std::size_t begin, std::span<const TokenTarget> part) {
    runner_.compute().for_rows(static_cast<std::int64_t>(part.size()), 20 * V, [&](std::int64_t i) {
      T* logits = logits_.data() + i * V;
      const auto row = runner_.compute().table().logits_row(logits, V, 1, config_.final_softcap, 0);
      T* to = out.data() + (static_cast<std::int64_t>(begin) + i) * V;
      for (std::int64_t v = 0; v < V; ++v) to[v] = static_cast<T>(static_cast<double>(logits[v]) - row.lse);
    });
  });
}

namespace {

// Labels of a score head that are asked at each row.
template <class T>
std::int64_t num_labels(const DecoderWeights<T>& weights, std::size_t rows, std::size_t values) {
  if (rows == 0) return 1;
  const auto labels = static_cast<std::int64_t>(values / rows);
  RLHF_CHECK(values % rows == 0 && labels >= 1 && labels <= weights.head.N, "scalar_outputs: ", values,
             " values for ", rows, " rows of a head with ", weights.head.N, " labels");
  return labels;
}

}  // namespace

template <class T>
void SequencePass<T>::scalar_outputs(const DecoderWeights<T>& weights, std::span<const std::int64_t> rows,
                                     std::span<T> values) {
  const std::int64_t D = config_.hidden_size, labels = num_labels(weights, rows.size(), values.size());
  runner_.compute().for_rows(static_cast<std::int64_t>(values.size()), 2 * D, [&](std::int64_t i) {
    const T* h = hidden_.data() + rows[to_size(i / labels)] * D;
    const T* w = weights.head.weight + i % labels * D;
    T sum = 0;
    for (std::int64_t d = 0; d < D; ++d) sum += h[d] * w[d];
    values[to_size(i)] = sum;
  });
}

template <class T>
void SequencePass<T>::scalar_outputs_backward(const DecoderWeights<T>& weights,
                                              std::span<const std::int64_t> rows,
                                              std::span<const T> dvalues) {
  const std::int64_t D = config_.hidden_size, labels = num_labels(weights, rows.size(), dvalues.size());
  for (std::size_t i = 0; i < dvalues.size(); ++i) {
    const std::int64_t row = rows[i / to_size(labels)], label = static_cast<std::int64_t>(i) % labels;
    const T* h = hidden_.data() + row * D;
    T* dh = dhidden_.data() + row * D;
    const T* w = weights.head.weight + label * D;
    for (std::int64_t d = 0; d < D; ++d) dh[d] += dvalues[i] * w[d];
    if (T* dw = weights.head.dweight)
      for (std::int64_t d = 0; d < D; ++d) dw[label * D + d] += dvalues[i] * h[d];
  }
}

template <class T>
void SequencePass<T>::backward(const DecoderWeights<T>& weights, const PackedRows& packed) {
  const std::int64_t rows = num_rows_, D = config_.hidden_size, first = weights.first_trainable_layer;
  dx_.reserve_discard(to_size(rows * D));
  std::fill_n(dx_.data(), rows * D, T(0));
  runner_.compute().norm_grad({dhidden_.data(), x_.data(), weights.final_norm.weight, mean_.data(),
                               rstd_.data(), dx_.data(), weights.final_norm.dweight, weights.final_norm.dbias,
                               rows, D, config_.norm == NormKind::kLayer, config_.norm_plus_one});
  if (first >= config_.num_layers) return;
  backward_trained_layers(weights, packed, first);
  if (weights.embedding_trainable) runner_.backward_embed(weights, packed.rows(), dx_.data());
}

template <class T>
std::size_t SequencePass<T>::activation_bytes(const ModelConfig& config, const PassShape& shape,
                                              std::int64_t kept_layers, Recompute recompute) {
  const std::int64_t D = config.hidden_size, q = config.query_width(), kv = config.kv_width();
  const std::int64_t qkv = q + 2 * kv, F = config.intermediate_size, M = config.gated_mlp ? 2 * F : F;
  const bool trains = kept_layers > 0;
  // Trunk, residual stream, normed states and the scratch of one layer's forward.
  std::int64_t per_row = 4 * D + 2 + qkv + q + M + F + (config.post_norms ? D : 0);
  if (trains) per_row += 3 * D + qkv + q + M + F + (config.post_norms ? D + 1 : 0);  // gradients
  const std::int64_t per_layer =
      2 * D + 2 * q + M + config.num_heads + 4 + (config.qk_norm ? qkv : 0) + (config.post_norms ? 2 * D : 0);
  const std::int64_t per_block = 2 * kv * kernels::kBlockTokens;
  const bool again = trains && recompute == Recompute::kLayers;
  if (again) per_row += (kept_layers + 1) * D;  // the layers' inputs, and the one that is computed again
  const std::int64_t whole_layers = again ? 1 : kept_layers;
  // K/V of one frozen layer at a time, of all layers that are there as a whole, and the gradient of one.
  const std::int64_t stored_layers = 1 + whole_layers + (trains ? 1 : 0);
  const std::int64_t chunk = std::min(shape.targets, logits_chunk_rows<T>(config));
  const std::int64_t rope = config.learned_positions ? 0 : std::max<std::int64_t>(256, shape.rows);
  return to_size(shape.rows * (per_row + whole_layers * per_layer) +
                 shape.blocks * per_block * stored_layers +
                 chunk * (config.vocab_size + (trains ? 2 : 1) * D) + rope * config.head_dim) *
         sizeof(T);
}

template <class T>
std::size_t SequencePass<T>::held_bytes() const {
  std::size_t total = trunk_store_.bytes() + store_.bytes() + logits_.bytes() + runner_.scratch_bytes();
  for (const Buffer<T>* b :
       {&trunk_, &x_, &layer_x_, &hidden_, &mean_, &rstd_, &dhidden_, &dx_, &gathered_, &dgathered_})
    total += b->bytes();
  for (const Buffer<T>& b : inputs_) total += b.bytes();
  for (const LayerActivations<T>& a : activations_) total += a.bytes();
  return total;
}

template <class T>
void SequencePass<T>::release() {
  trunk_store_ = KvStore<T>(config_, 1, 0, buffers_);
  store_ = {};
  store_layers_ = 0;
  activations_.clear();
  inputs_.clear();
  for (Buffer<T>* b : {&trunk_, &x_, &layer_x_, &hidden_, &mean_, &rstd_, &dhidden_, &dx_, &gathered_,
                       &dgathered_, &logits_})
    *b = Buffer<T>(0, buffers_);
  runner_.release_scratch();
  cached_chunk_ = nullptr;
  trunk_layer_ = -1;
}

template class SequencePass<float>;
template class SequencePass<double>;

}  // namespace rlhf

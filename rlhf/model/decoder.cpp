// Shape legend: T rows, D width, N query heads, G kv heads, H head width, F MLP width.
#include "rlhf/model/decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numbers>

#include "rlhf/core/error.h"

namespace rlhf {

using kernels::kBlockTokens;

template <class T>
KvStore<T>::KvStore(const ModelConfig& config, std::int64_t num_layers, std::int64_t num_blocks)
    : block_stride_(config.kv_width() * kBlockTokens),
      layer_stride_(block_stride_ * num_blocks),
      num_layers_(num_layers),
      num_blocks_(num_blocks),
      k_(static_cast<std::size_t>(layer_stride_ * num_layers)),
      v_(static_cast<std::size_t>(layer_stride_ * num_layers)) {}

template <class T>
std::size_t KvStore<T>::block_bytes(const ModelConfig& config, std::int64_t num_layers) {
  return static_cast<std::size_t>(2 * config.kv_width() * kBlockTokens * num_layers) * sizeof(T);
}

template <class T>
void KvStore<T>::copy_block(std::int64_t from, std::int64_t to) {
  for (Buffer<T>* buffer : {&k_, &v_})
    for (std::int64_t layer = 0; layer < num_layers_; ++layer) {
      T* base = buffer->data() + layer * layer_stride_;
      std::copy_n(base + from * block_stride_, block_stride_, base + to * block_stride_);
    }
}

template <class T>
void KvStore<T>::discard_blocks(std::int64_t begin, std::int64_t end) {
  for (Buffer<T>* buffer : {&k_, &v_})
    for (std::int64_t layer = 0; layer < num_layers_; ++layer)
      buffer->discard(static_cast<std::size_t>(layer * layer_stride_ + begin * block_stride_),
                      static_cast<std::size_t>(layer * layer_stride_ + end * block_stride_));
}

template <class T>
void KvStore<T>::reserve_discard(std::int64_t num_blocks) {
  if (num_blocks <= num_blocks_) return;
  num_blocks_ = num_blocks;
  layer_stride_ = block_stride_ * num_blocks;
  k_.reserve_discard(static_cast<std::size_t>(layer_stride_ * num_layers_));
  v_.reserve_discard(static_cast<std::size_t>(layer_stride_ * num_layers_));
}

std::vector<double> rope_frequencies(const ModelConfig& config) {
  const RopeOptions& rope = config.rope;
  std::vector<double> frequencies;
  for (std::int64_t i = 0; i < config.head_dim / 2; ++i) {
    double frequency =
        std::pow(rope.theta, -2.0 * static_cast<double>(i) / static_cast<double>(config.head_dim));
    if (rope.scaling == RopeScaling::kLinear) {
      frequency /= rope.factor;
    } else if (rope.scaling == RopeScaling::kLlama3) {
      // transformers _compute_llama3_parameters: long waves are stretched, short ones kept, a ramp between.
      const double wavelength = 2 * std::numbers::pi / frequency;
      const double low = static_cast<double>(rope.original_max_positions) / rope.low_freq_factor;
      const double high = static_cast<double>(rope.original_max_positions) / rope.high_freq_factor;
      if (wavelength > low) {
        frequency /= rope.factor;
      } else if (wavelength >= high) {
        const double smooth =
            (static_cast<double>(rope.original_max_positions) / wavelength - rope.low_freq_factor) /
            (rope.high_freq_factor - rope.low_freq_factor);
        frequency = (1 - smooth) * frequency / rope.factor + smooth * frequency;
      }
    }
    frequencies.push_back(frequency);
  }
  return frequencies;
}

template <class T>
DecoderRunner<T>::DecoderRunner(const ModelConfig& config, Compute<T> compute)
    : config_(config), compute_(compute) {
  RLHF_CHECK(config.num_heads / config.num_kv_heads <= 64,
             "decoder: ", config.num_heads / config.num_kv_heads,
             " query heads share one kv head; at most 64 are supported");
}

template <class T>
void DecoderRunner<T>::grow_rope_table(std::int64_t positions) {
  if (positions <= rope_positions_ || config_.learned_positions) return;
  rope_positions_ = std::max<std::int64_t>({positions, 2 * rope_positions_, 256});
  const std::vector<double> frequencies = rope_frequencies(config_);
  const std::size_t half = frequencies.size();
  cos_ = Buffer<T>(static_cast<std::size_t>(rope_positions_) * half);
  sin_ = Buffer<T>(static_cast<std::size_t>(rope_positions_) * half);
  for (std::int64_t p = 0; p < rope_positions_; ++p)
    for (std::size_t i = 0; i < half; ++i) {
      // float32 angles, as the reference implementation has them, when T is float.
      const T angle = static_cast<T>(p) * static_cast<T>(frequencies[i]);
      cos_[static_cast<std::size_t>(p) * half + i] = std::cos(angle);
      sin_[static_cast<std::size_t>(p) * half + i] = std::sin(angle);
    }
}

template <class T>
kernels::NormArgs<T> DecoderRunner<T>::norm_args(const NormWeights<T>& norm, const T* x, T* y, T* mean,
                                                 T* rstd) const {
  return {x,
          norm.weight,
          norm.bias,
          y,
          mean,
          rstd,
          config_.hidden_size,
          config_.norm_eps,
          config_.norm == NormKind::kLayer,
          config_.norm_plus_one};
}

template <class T>
kernels::NormGradArgs<T> DecoderRunner<T>::norm_grad_args(const NormWeights<T>& norm, const T* dy, const T* x,
                                                          const T* mean, const T* rstd, T* dx,
                                                          std::int64_t rows) const {
  return {dy,
          x,
          norm.weight,
          mean,
          rstd,
          dx,
          norm.dweight,
          norm.dbias,
          rows,
          config_.hidden_size,
          config_.norm == NormKind::kLayer,
          config_.norm_plus_one};
}

template <class T>
kernels::AttentionArgs<T> DecoderRunner<T>::attention_args(const T* k, const T* v,
                                                           std::int64_t block_stride) const {
  return {k,
          v,
          block_stride,
          config_.num_heads,
          config_.num_kv_heads,
          config_.head_dim,
          config_.attention_scale,
          config_.attention_softcap};
}

template <class T>
std::int64_t DecoderRunner<T>::first_key(std::int64_t layer, std::int64_t position) const {
  const std::int64_t window = config_.layer_window[static_cast<std::size_t>(layer)];
  return window > 0 ? std::max<std::int64_t>(0, position + 1 - window) : 0;
}

template <class T>
kernels::GluKind DecoderRunner<T>::activation_kind() const {
  RLHF_CHECK(config_.gated_mlp || config_.activation == Activation::kGeluTanh,
             "decoder: an MLP without gate is supported with gelu_new only");
  if (!config_.gated_mlp) return kernels::GluKind::kGeluTanhPlain;
  return config_.activation == Activation::kSilu ? kernels::GluKind::kSilu : kernels::GluKind::kGeluTanh;
}

template <class T>
void DecoderRunner<T>::linear(const LinearWeights<T>& w, std::int64_t rows, const T* x, T* y,
                              bool accumulate) {
  compute_.linear({x, w.K, w.weight, w.bias, y, w.N, w.K, accumulate}, rows, w.N);
  for (const LoraWeights<T>& adapter : w.adapters) {
    low_rank_.reserve_discard(static_cast<std::size_t>(rows * adapter.rank));
    compute_.linear({x, w.K, adapter.a, nullptr, low_rank_.data(), adapter.rank, w.K, false}, rows,
                    adapter.rank);
    compute_.scale(low_rank_.data(), adapter.scale, rows * adapter.rank);
    compute_.linear(
        {low_rank_.data(), adapter.rank, adapter.b, nullptr, y + adapter.first_row, w.N, adapter.rank, true},
        rows, adapter.num_rows);
  }
}

template <class T>
void DecoderRunner<T>::linear_backward(const LinearWeights<T>& w, std::int64_t rows, const T* x, const T* dy,
                                       T* dx, bool accumulate) {
  if (dx) compute_.gemm({dy, w.N, 1, w.weight, w.K, dx, w.K, rows, w.K, w.N, accumulate});
  if (w.dweight) compute_.gemm({dy, 1, w.N, x, w.K, w.dweight, w.K, w.N, w.K, rows, true});
  if (w.dbias) compute_.add_column_sums(w.dbias, dy, rows, w.N);
  for (const LoraWeights<T>& adapter : w.adapters) {
    const std::int64_t r = adapter.rank;
    low_rank_.reserve_discard(static_cast<std::size_t>(rows * r));
    dlow_rank_.reserve_discard(static_cast<std::size_t>(rows * r));
    T* u = low_rank_.data();
    T* du = dlow_rank_.data();
    const T* dy_part = dy + adapter.first_row;
    // du = s dy B, dB += s dy^T u, dA += du^T x, dx += du A with u = A x.
    compute_.gemm({dy_part, w.N, 1, adapter.b, r, du, r, rows, r, adapter.num_rows, false});
    compute_.scale(du, adapter.scale, rows * r);
    if (adapter.db) {
      compute_.linear({x, w.K, adapter.a, nullptr, u, r, w.K, false}, rows, r);
      compute_.scale(u, adapter.scale, rows * r);
      compute_.gemm({dy_part, 1, w.N, u, r, adapter.db, r, adapter.num_rows, r, rows, true});
    }
    if (adapter.da) compute_.gemm({du, 1, r, x, w.K, adapter.da, w.K, r, w.K, rows, true});
    if (dx) compute_.gemm({du, r, 1, adapter.a, w.K, dx, w.K, rows, w.K, r, true});
  }
}

template <class T>
void DecoderRunner<T>::embed(const DecoderWeights<T>& weights, const Rows& rows, T* x) {
  const std::int64_t D = config_.hidden_size;
  const T scale = static_cast<T>(config_.embedding_scale);
  compute_.for_rows(rows.size(), D, [&](std::int64_t t) {
    const TokenId token = rows.tokens[static_cast<std::size_t>(t)];
    const std::int64_t position = rows.positions[static_cast<std::size_t>(t)];
    RLHF_CHECK(token >= 0 && token < config_.vocab_size, "token id ", token, " is outside the vocabulary of ",
               config_.vocab_size);
    RLHF_CHECK(position < config_.max_positions, "position ", position, " is beyond the model's context of ",
               config_.max_positions, " tokens");
    const T* row = weights.embedding + token * D;
    T* out = x + t * D;
    for (std::int64_t d = 0; d < D; ++d) out[d] = row[d] * scale;
    if (weights.positions)
      for (std::int64_t d = 0; d < D; ++d) out[d] += weights.positions[position * D + d];
  });
}

template <class T>
void DecoderRunner<T>::qk_norm_forward(const NormWeights<T>& norm, T* x, std::int64_t heads, std::int64_t) {
  kernels::NormArgs<T> args{x,       norm.weight,      nullptr,          x,     nullptr,
                            nullptr, config_.head_dim, config_.norm_eps, false, config_.norm_plus_one};
  compute_.table().norm(args, 0, heads);
}

template <class T>
void DecoderRunner<T>::attend(const kernels::AttentionArgs<T>& args, const Rows& rows, std::int64_t layer,
                              const T* q, std::int64_t q_stride, T* out, T* lse) {
  constexpr std::int64_t kRowsPerTask = 8;  // neighbours are often rows of one sequence
  const std::int64_t count = rows.size(), N = args.N, G = args.G;
  const std::int64_t chunks = (count + kRowsPerTask - 1) / kRowsPerTask;
  const std::int64_t keys = rows.positions.empty() ? 1 : rows.positions.back() + kBlockTokens;
  compute_.for_rows(chunks * G, kRowsPerTask * 4 * N * args.H * keys / G, [&](std::int64_t task) {
    const std::int64_t first = task / G * kRowsPerTask, last = std::min(count, first + kRowsPerTask);
    kernels::AttentionRow<T> chunk[kRowsPerTask];
    for (std::int64_t t = first; t < last; ++t) {
      const auto row = static_cast<std::size_t>(t);
      const std::int64_t position = rows.positions[row];
      chunk[t - first] = {q + t * q_stride, out + t * N * args.H,       lse ? lse + t * N : nullptr,
                          rows.tables[row], first_key(layer, position), position + 1};
    }
    compute_.table().attention(args, chunk, last - first, task % G);
  });
}

template <class T>
void DecoderRunner<T>::attention_block(const DecoderWeights<T>&, const LayerWeights<T>& layer,
                                       const Rows& rows, std::int64_t index, T* k, T* v,
                                       std::int64_t block_stride, T* x, LayerActivations<T>* keep) {
  const std::int64_t rows_count = rows.size(), D = config_.hidden_size, H = config_.head_dim;
  const std::int64_t N = config_.num_heads, G = config_.num_kv_heads, width = qkv_width();
  const auto size = [](std::int64_t n) { return static_cast<std::size_t>(n); };
  normed_.reserve_discard(size(rows_count * D));
  qkv_.reserve_discard(size(rows_count * width));
  if (keep) {
    keep->input.reserve_discard(size(rows_count * D));
    keep->attention_mean.reserve_discard(size(rows_count));
    keep->attention_rstd.reserve_discard(size(rows_count));
    keep->q.reserve_discard(size(rows_count * N * H));
    keep->attention.reserve_discard(size(rows_count * N * H));
    keep->lse.reserve_discard(size(rows_count * N));
    std::copy_n(x, rows_count * D, keep->input.data());
  } else {
    attention_out_.reserve_discard(size(rows_count * N * H));
  }
  compute_.norm(
      norm_args(layer.attention_norm, x, normed_.data(), keep ? keep->attention_mean.data() : nullptr,
                keep ? keep->attention_rstd.data() : nullptr),
      rows_count);
  linear(layer.qkv, rows_count, normed_.data(), qkv_.data(), false);
  if (keep && config_.qk_norm) {
    keep->qkv_raw.reserve_discard(size(rows_count * width));
    std::copy_n(qkv_.data(), rows_count * width, keep->qkv_raw.data());
  }
  const bool rotate = config_.layer_uses_rope[size(index)] && !config_.learned_positions;
  const kernels::RopeArgs<T> rope{qkv_.data(),           width, N + G, H, cos_.data(), sin_.data(),
                                  rows.positions.data(), false};
  compute_.for_rows(rows_count, 4 * width, [&](std::int64_t t) {
    T* row = qkv_.data() + t * width;
    if (layer.q_norm.weight) qk_norm_forward(layer.q_norm, row, N, t);
    if (layer.k_norm.weight) qk_norm_forward(layer.k_norm, row + N * H, G, t);
    if (rotate) compute_.table().rope(rope, t, t + 1);
    const std::int64_t position = rows.positions[size(t)], slot = position % kBlockTokens;
    const T* key = row + N * H;
    const T* value = key + G * H;
    const auto write = [&](std::int32_t block) {
      for (std::int64_t g = 0; g < G; ++g) {
        T* k_block = k + block * block_stride + g * H * kBlockTokens + slot;
        T* v_block = v + block * block_stride + (g * kBlockTokens + slot) * H;
        for (std::int64_t h = 0; h < H; ++h) k_block[h * kBlockTokens] = key[g * H + h];
        for (std::int64_t h = 0; h < H; ++h) v_block[h] = value[g * H + h];
      }
    };
    write(rows.tables[size(t)][position / kBlockTokens]);
    for (const std::int32_t block : rows.copies_of(t)) write(block);
    if (keep) std::copy_n(row, N * H, keep->q.data() + t * N * H);
  });
  T* out = keep ? keep->attention.data() : attention_out_.data();
  const kernels::AttentionArgs<T> args = attention_args(k, v, block_stride);
  attend(args, rows, index, keep ? keep->q.data() : qkv_.data(), keep ? N * H : width, out,
         keep ? keep->lse.data() : nullptr);
  if (!layer.post_attention_norm.weight) {
    linear(layer.out, rows_count, out, x, true);
    return;
  }
  Buffer<T>& projected = keep ? keep->post_attention_in : projected_;
  projected.reserve_discard(size(rows_count * D));
  linear(layer.out, rows_count, out, projected.data(), false);
  compute_.norm(norm_args(layer.post_attention_norm, projected.data(), normed_.data(), nullptr, nullptr),
                rows_count);
  compute_.add(x, normed_.data(), rows_count * D);
}

template <class T>
void DecoderRunner<T>::mlp_block(const LayerWeights<T>& layer, std::int64_t rows, T* x,
                                 LayerActivations<T>* keep) {
  const std::int64_t D = config_.hidden_size, F = config_.intermediate_size;
  const auto size = [](std::int64_t n) { return static_cast<std::size_t>(n); };
  Buffer<T>& gate_up = keep ? keep->gate_up : gate_up_;
  normed_.reserve_discard(size(rows * D));
  gate_up.reserve_discard(size(rows * mlp_width()));
  hidden_.reserve_discard(size(rows * F));
  if (keep) {
    keep->middle.reserve_discard(size(rows * D));
    keep->mlp_mean.reserve_discard(size(rows));
    keep->mlp_rstd.reserve_discard(size(rows));
    std::copy_n(x, rows * D, keep->middle.data());
  }
  compute_.norm(norm_args(layer.mlp_norm, x, normed_.data(), keep ? keep->mlp_mean.data() : nullptr,
                          keep ? keep->mlp_rstd.data() : nullptr),
                rows);
  linear(layer.gate_up, rows, normed_.data(), gate_up.data(), false);
  compute_.activation({gate_up.data(), hidden_.data(), F, activation_kind()}, rows);
  if (!layer.post_mlp_norm.weight) {
    linear(layer.down, rows, hidden_.data(), x, true);
    return;
  }
  Buffer<T>& projected = keep ? keep->post_mlp_in : projected_;
  projected.reserve_discard(size(rows * D));
  linear(layer.down, rows, hidden_.data(), projected.data(), false);
  compute_.norm(norm_args(layer.post_mlp_norm, projected.data(), normed_.data(), nullptr, nullptr), rows);
  compute_.add(x, normed_.data(), rows * D);
}

template <class T>
void DecoderRunner<T>::forward_layers(const DecoderWeights<T>& weights, const Rows& rows, std::int64_t first,
                                      std::int64_t last, KvStore<T>& store, std::int64_t store_base, T* x,
                                      std::vector<LayerActivations<T>>* activations) {
  if (rows.size() == 0) return;
  grow_rope_table(1 + *std::max_element(rows.positions.begin(), rows.positions.end()));
  if (activations && static_cast<std::int64_t>(activations->size()) < last - first)
    activations->resize(static_cast<std::size_t>(last - first));
  for (std::int64_t l = first; l < last; ++l) {
    const LayerWeights<T>& layer = weights.layers[static_cast<std::size_t>(l)];
    LayerActivations<T>* keep = activations ? &(*activations)[static_cast<std::size_t>(l - first)] : nullptr;
    attention_block(weights, layer, rows, l, store.k(l - store_base), store.v(l - store_base),
                    store.block_stride(), x, keep);
    mlp_block(layer, rows.size(), x, keep);
  }
}

template <class T>
void DecoderRunner<T>::final_norm(const DecoderWeights<T>& weights, std::int64_t rows, const T* x, T* y,
                                  T* mean, T* rstd) {
  compute_.norm(norm_args(weights.final_norm, x, y, mean, rstd), rows);
}

template <class T>
std::size_t LayerActivations<T>::bytes() const {
  std::size_t total = 0;
  for (const Buffer<T>* buffer :
       {&input, &q, &attention, &lse, &middle, &gate_up, &attention_mean, &attention_rstd, &mlp_mean,
        &mlp_rstd, &qkv_raw, &post_attention_in, &post_mlp_in})
    total += buffer->bytes();
  return total;
}

template <class T>
std::size_t DecoderRunner<T>::scratch_bytes() const {
  std::size_t total = cos_.bytes() + sin_.bytes();
  for (const Buffer<T>* buffer :
       {&normed_, &qkv_, &attention_out_, &gate_up_, &hidden_, &projected_, &low_rank_, &dlow_rank_, &dqkv_,
        &dattention_, &dhidden_, &dgate_up_, &dnormed_, &dk_, &dv_, &drow_})
    total += buffer->bytes();
  return total;
}

template <class T>
void DecoderRunner<T>::release_scratch() {
  for (Buffer<T>* buffer :
       {&normed_, &qkv_, &attention_out_, &gate_up_, &hidden_, &projected_, &low_rank_, &dlow_rank_, &dqkv_,
        &dattention_, &dhidden_, &dgate_up_, &dnormed_, &dk_, &dv_, &drow_})
    *buffer = {};
}

template class KvStore<float>;
template class KvStore<double>;
template struct LayerActivations<float>;
template struct LayerActivations<double>;
template class DecoderRunner<float>;
template class DecoderRunner<double>;

}  // namespace rlhf

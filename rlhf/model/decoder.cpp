// Shape legend: T rows, D width, N query heads, G kv heads, H head width, F MLP width.
#include "rlhf/model/decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numbers>

#include "rlhf/core/error.h"
#include "rlhf/model/layer_stream.h"
#include "rlhf/tensor/arena.h"

namespace rlhf {

using kernels::kBlockTokens;

template <class T>
KvStore<T>::KvStore(const ModelConfig& config, std::int64_t num_layers, std::int64_t num_blocks,
                    DeviceMemory* memory)
    : kv_elements_(config.kv_width() * kBlockTokens),
      block_stride_(kv_elements_),
      layer_stride_(block_stride_ * num_blocks),
      num_layers_(num_layers),
      num_blocks_(num_blocks),
      memory_(memory),
      k_(static_cast<std::size_t>(layer_stride_ * num_layers), memory),
      v_(static_cast<std::size_t>(layer_stride_ * num_layers), memory) {}

namespace {

// Of K, or V, of one block and layer.
std::int64_t kv_elements(const ModelConfig& config, KvFormat format) {
  const std::int64_t G = config.num_kv_heads, H = config.head_dim;
  return format == KvFormat::kFp8 ? kernels::block_elements<Float8>(G, H) : kernels::block_elements(G, H);
}

}  // namespace

template <class T>
KvStore<T>::KvStore(const ModelConfig& config, std::int64_t num_layers, const Arena& arena,
                    DeviceMemory* memory, KvFormat format)
    : format_(format),
      kv_elements_(kv_elements(config, format)),
      block_stride_(
          -static_cast<std::int64_t>(arena.layout().slab_bytes() / element_bytes())),  // they go down
      layer_stride_(2 * kv_elements_),
      num_layers_(num_layers),
      memory_(memory),
      in_slabs_(arena.first_slab()) {}

template <class T>
std::size_t KvStore<T>::block_bytes(const ModelConfig& config, std::int64_t num_layers, KvFormat format) {
  const std::size_t bytes = static_cast<std::size_t>(2 * kv_elements(config, format) * num_layers) *
                            (format == KvFormat::kFp8 ? sizeof(Float8) : sizeof(T));
  return (bytes + ArenaLayout::kAlignment - 1) / ArenaLayout::kAlignment * ArenaLayout::kAlignment;
}

template <class T>
void KvStore<T>::copy_block(std::int64_t from, std::int64_t to) {
  const std::int64_t stride = block_stride_ * static_cast<std::int64_t>(element_bytes());
  const auto copy = [&](void* base, std::int64_t elements) {
    char* const bytes = static_cast<char*>(base);
    const auto count = static_cast<std::size_t>(elements) * element_bytes();
    if (memory_)
      memory_->copy(bytes + to * stride, bytes + from * stride, count);
    else
      std::memcpy(bytes + to * stride, bytes + from * stride, count);
  };
  if (in_slabs_) return copy(in_slabs_, layer_stride_ * num_layers_);  // a block's layers lie together
  for (std::int64_t layer = 0; layer < num_layers_; ++layer)
    for (T* base : {k(layer), v(layer)}) copy(base, kv_elements_);
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
LayerActivations<T>::LayerActivations(DeviceMemory* memory) {
  for (Buffer<T>* b : {&input, &q, &attention, &middle, &gate_up, &qkv_raw, &post_attention_in, &post_mlp_in})
    *b = Buffer<T>(0, memory);
  for (Buffer<Wide<T>>* b : {&lse, &attention_mean, &attention_rstd, &mlp_mean, &mlp_rstd})
    *b = Buffer<Wide<T>>(0, memory);
}

template <class T>
std::size_t LayerActivations<T>::bytes() const {
  std::size_t total = 0;
  for (const Buffer<T>* b :
       {&input, &q, &attention, &middle, &gate_up, &qkv_raw, &post_attention_in, &post_mlp_in})
    total += b->bytes();
  for (const Buffer<Wide<T>>* b : {&lse, &attention_mean, &attention_rstd, &mlp_mean, &mlp_rstd})
    total += b->bytes();
  return total;
}

template <class T>
DecoderRunner<T>::DecoderRunner(const ModelConfig& config, DeviceOps<T> ops)
    : config_(config), ops_(std::move(ops)) {
  RLHF_CHECK(config.num_heads / config.num_kv_heads <= 64,
             "decoder: ", config.num_heads / config.num_kv_heads,
             " query heads share one kv head; at most 64 are supported");
  for (Buffer<Wide<T>>* b : {&cos_, &sin_}) *b = Buffer<Wide<T>>(0, ops_.buffers());
  release_scratch();
}

template <class T>
std::size_t DecoderRunner<T>::scratch_bytes() const {
  std::size_t total = cos_.bytes() + sin_.bytes() + quantised_.bytes();
  for (const auto* b : scratch_of(*this)) total += b->bytes();
  for (const auto* b : wide_scratch_of(*this)) total += b->bytes();
  return total;
}

template <class T>
std::vector<const void*> DecoderRunner<T>::scratch_addresses() const {
  std::vector<const void*> addresses = {cos_.data(), sin_.data()};
  for (const auto* b : scratch_of(*this)) addresses.push_back(b->data());
  for (const auto* b : wide_scratch_of(*this)) addresses.push_back(b->data());
  if (device_rows_) addresses.push_back(device_rows_->view().tokens);
  return addresses;
}

template <class T>
void DecoderRunner<T>::release_scratch() {
  for (auto* b : scratch_of(*this)) *b = Buffer<T>(0, ops_.buffers());
  for (auto* b : wide_scratch_of(*this)) *b = Buffer<Wide<T>>(0, ops_.buffers());
  quantised_ = QuantisedRows();
}

template <class T>
kernels::PassRows DecoderRunner<T>::place(const Rows& rows, Upload upload) {
  if (!ops_.memory()) return rows.view();
  if (!device_rows_) device_rows_.emplace(*ops_.memory());
  if (upload == Upload::kUnlessThere && placed_rows_ == &rows) return device_rows_->view();
  placed_rows_ = &rows;
  return device_rows_->place(rows);
}

template <class T>
void DecoderRunner<T>::grow_rope_table(std::int64_t positions) {
  if (positions <= rope_positions_ || config_.learned_positions) return;
  rope_positions_ = std::max<std::int64_t>({positions, 2 * rope_positions_, 256});
  const std::vector<double> frequencies = rope_frequencies(config_);
  std::vector<Wide<T>> cosines, sines;
  for (std::int64_t p = 0; p < rope_positions_; ++p)
    for (const double frequency : frequencies) {
      // float32 angles, as the reference implementation has them, unless T is double.
      const Wide<T> angle = static_cast<Wide<T>>(p) * static_cast<Wide<T>>(frequency);
      cosines.push_back(std::cos(angle));
      sines.push_back(std::sin(angle));
    }
  cos_.reserve_discard(cosines.size());
  sin_.reserve_discard(sines.size());
  ops_.upload(cos_.data(), cosines.data(), cosines.size() * sizeof(Wide<T>));
  ops_.upload(sin_.data(), sines.data(), sines.size() * sizeof(Wide<T>));
}

template <class T>
kernels::NormArgs<T> DecoderRunner<T>::norm_args(const NormWeights<T>& norm, const T* x, T* y, Wide<T>* mean,
                                                 Wide<T>* rstd) const {
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
                                                          const Wide<T>* mean, const Wide<T>* rstd, T* dx,
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
kernels::GluKind DecoderRunner<T>::activation_kind() const {
  RLHF_CHECK(config_.gated_mlp || config_.activation == Activation::kGeluTanh,
             "decoder: an MLP without gate is supported with gelu_new only");
  if (!config_.gated_mlp) return kernels::GluKind::kGeluTanhPlain;
  return config_.activation == Activation::kSilu ? kernels::GluKind::kSilu : kernels::GluKind::kGeluTanh;
}

template <class T>
void DecoderRunner<T>::linear(const LinearWeights<T>& w, std::int64_t rows, const T* x, T* y,
                              bool accumulate) {
  if constexpr (std::is_same_v<T, float>) {
    if (w.packed)
      packed_linear(ops_.compute(), *w.packed, {x, w.K, w.bias, y, w.N, accumulate}, rows, quantised_);
  }
  if (try_few_rows({{x, w.K, w.weight, w.bias, y, w.N, w.K, accumulate}, rows}, w)) return;
  count_products(rows, w.N * w.K);
  if (!w.packed) ops_.linear({x, w.K, w.weight, w.bias, y, w.N, w.K, accumulate}, rows, w.N);
  for (const LoraWeights<T>& adapter : w.adapters) {
    low_rank_.reserve_discard(static_cast<std::size_t>(rows * adapter.rank));
    count_products(rows, adapter.rank * (w.K + adapter.num_rows));
    ops_.linear({x, w.K, adapter.a, nullptr, low_rank_.data(), adapter.rank, w.K, false}, rows, adapter.rank);
    ops_.scale(low_rank_.data(), adapter.scale, rows * adapter.rank);
    ops_.linear(
        {low_rank_.data(), adapter.rank, adapter.b, nullptr, y + adapter.first_row, w.N, adapter.rank, true},
        rows, adapter.num_rows);
  }
}

template <class T>
bool DecoderRunner<T>::try_few_rows(const kernels::FewRowsArgs<T>& args, const LinearWeights<T>& w) {
  const std::int64_t N = args.gated ? w.N / 2 : w.N;
  if (w.packed || !w.adapters.empty() || !ops_.prefers_few_rows(args, N)) return false;
  count_products(args.M, w.N * w.K);
  ops_.few_rows_linear(args, N);
  return true;
}

template <class T>
void DecoderRunner<T>::linear_backward(const LinearWeights<T>& w, std::int64_t rows, const T* x, const T* dy,
                                       T* dx, bool accumulate) {
  count_products(rows, w.N * w.K * ((dx != nullptr) + (w.dweight != nullptr)));
  if (dx) ops_.gemm({dy, w.N, 1, w.weight, w.K, dx, w.K, rows, w.K, w.N, accumulate});
  if (w.dweight) ops_.gemm_wide({dy, 1, w.N, x, w.K, w.dweight, w.K, w.N, w.K, rows, true});
  if (w.dbias) ops_.add_column_sums(w.dbias, dy, rows, w.N);
  for (const LoraWeights<T>& adapter : w.adapters) {
    const std::int64_t r = adapter.rank;
    low_rank_.reserve_discard(static_cast<std::size_t>(rows * r));
    dlow_rank_.reserve_discard(static_cast<std::size_t>(rows * r));
    T* u = low_rank_.data();
    T* du = dlow_rank_.data();
    const T* dy_part = dy + adapter.first_row;
    count_products(rows, r * (adapter.num_rows * (1 + (adapter.db != nullptr)) +
                              w.K * ((adapter.db != nullptr) + (adapter.da != nullptr) + (dx != nullptr))));
    // du = s dy B, dB += s dy^T u, dA += du^T x, dx += du A with u = A x.
    ops_.gemm({dy_part, w.N, 1, adapter.b, r, du, r, rows, r, adapter.num_rows, false});
    ops_.scale(du, adapter.scale, rows * r);
    if (adapter.db) {
      ops_.linear({x, w.K, adapter.a, nullptr, u, r, w.K, false}, rows, r);
      ops_.scale(u, adapter.scale, rows * r);
      ops_.gemm_wide({dy_part, 1, w.N, u, r, adapter.db, r, adapter.num_rows, r, rows, true});
    }
    if (adapter.da) ops_.gemm_wide({du, 1, r, x, w.K, adapter.da, w.K, r, w.K, rows, true});
    if (dx) ops_.gemm({du, r, 1, adapter.a, w.K, dx, w.K, rows, w.K, r, true});
  }
}

template <class T>
void DecoderRunner<T>::count_attention(const std::vector<std::int32_t>& positions, std::int64_t first,
                                       std::int64_t last, int products) {
  double full = 0;  // keys of all rows without a window
  for (const std::int32_t position : positions) full += position + 1;
  for (std::int64_t l = first; l < last; ++l) {
    double keys = full;
    if (const std::int64_t width = window(l); width > 0) {
      keys = 0;
      for (const std::int32_t position : positions)
        keys += static_cast<double>(std::min<std::int64_t>(position + 1, width));
    }
    matmul_flops_ += 2.0 * products * keys * static_cast<double>(config_.num_heads * config_.head_dim);
  }
}

template <class T>
void DecoderRunner<T>::embed(const DecoderWeights<T>& weights, const Rows& rows, T* x, Upload upload) {
  for (std::int64_t t = 0; t < rows.size(); ++t) {
    const TokenId token = rows.tokens[static_cast<std::size_t>(t)];
    const std::int64_t position = rows.positions[static_cast<std::size_t>(t)];
    RLHF_CHECK(token >= 0 && token < config_.vocab_size, "token id ", token, " is outside the vocabulary of ",
               config_.vocab_size);
    RLHF_CHECK(position < config_.max_positions, "position ", position, " is beyond the model's context of ",
               config_.max_positions, " tokens");
  }
  ops_.embed({weights.embedding, weights.positions, x, config_.hidden_size, config_.embedding_scale},
             place(rows, upload));
}

template <class T>
void DecoderRunner<T>::upload(const Rows& rows, std::int64_t max_keys) {
  place(rows, Upload::kAlways);
  device_rows_->reach(max_keys);
  grow_rope_table(device_rows_->view().max_keys);
}

template <class T>
void DecoderRunner<T>::count_layers(const DecoderWeights<T>& weights, const Rows& rows) {
  for (const LayerWeights<T>& layer : weights.layers)
    for (const LinearWeights<T>* w : {&layer.qkv, &layer.out, &layer.gate_up, &layer.down}) {
      count_products(rows.size(), w->N * w->K);
      for (const LoraWeights<T>& adapter : w->adapters)
        count_products(rows.size(), adapter.rank * (w->K + adapter.num_rows));
    }
  count_attention(rows.positions, 0, config_.num_layers, 2);
}

template <class T>
template <class E>
void DecoderRunner<T>::append_and_attend(const LayerWeights<T>& layer, const kernels::PassRows& rows,
                                         std::int64_t index, E* k, E* v, std::int64_t block_stride, T* out,
                                         LayerActivations<T>* keep) {
  const std::int64_t H = config_.head_dim, N = config_.num_heads;
  const bool rotate = rotates(index);
  T* const q = keep ? keep->q.data() : nullptr;
  ops_.append(kernels::AppendArgs<T, E>{qkv_.data(), q, k, v, block_stride, N, config_.num_kv_heads, H,
                                        layer.q_norm.weight, layer.k_norm.weight, config_.norm_eps,
                                        config_.norm_plus_one, rotate ? cos_.data() : nullptr,
                                        rotate ? sin_.data() : nullptr},
              rows);
  if (ops_.memory()) {
    const bool tiles = rows.num_tiles > 0 && sizeof(T) == sizeof(Bfloat16) && kernels::takes_tiles(H);
    workspace_.reserve_discard(to_size(kernels::attention_workspace(tiles ? rows.num_single_rows : rows.count,
                                                                    N, H, rows.max_keys, window(index))));
  }
  ops_.attention(
      kernels::PassAttentionArgs<T, E>{attention_args(k, v, block_stride), q ? q : qkv_.data(),
                                       q ? N * H : qkv_width(), out, keep ? keep->lse.data() : nullptr,
                                       window(index), workspace_.data()},
      rows);
}

template <class T>
void DecoderRunner<T>::attention_block(const LayerWeights<T>& layer, const kernels::PassRows& rows,
                                       std::int64_t index, KvStore<T>& store, std::int64_t store_layer, T* x,
                                       LayerActivations<T>* keep) {
  const std::int64_t D = config_.hidden_size, H = config_.head_dim, N = config_.num_heads,
                     width = qkv_width();
  normed_.reserve_discard(to_size(rows.count * D));
  qkv_.reserve_discard(to_size(rows.count * width));
  if (keep) {
    keep->input.reserve_discard(to_size(rows.count * D));
    keep->attention_mean.reserve_discard(to_size(rows.count));
    keep->attention_rstd.reserve_discard(to_size(rows.count));
    keep->q.reserve_discard(to_size(rows.count * N * H));
    keep->attention.reserve_discard(to_size(rows.count * N * H));
    keep->lse.reserve_discard(to_size(rows.count * N));
    ops_.copy(keep->input.data(), x, rows.count * D);
  } else {
    attention_out_.reserve_discard(to_size(rows.count * N * H));
  }
  const kernels::NormArgs<T> norm =
      norm_args(layer.attention_norm, x, normed_.data(), keep ? keep->attention_mean.data() : nullptr,
                keep ? keep->attention_rstd.data() : nullptr);
  if (keep || !try_few_rows(
                  {{x, D, layer.qkv.weight, layer.qkv.bias, qkv_.data(), width, D, false}, rows.count, norm},
                  layer.qkv)) {
    ops_.norm(norm, rows.count);
    linear(layer.qkv, rows.count, normed_.data(), qkv_.data(), false);
  }
  if (keep && config_.qk_norm) {
    keep->qkv_raw.reserve_discard(to_size(rows.count * width));
    ops_.copy(keep->qkv_raw.data(), qkv_.data(), rows.count * width);
  }
  T* out = keep ? keep->attention.data() : attention_out_.data();
  const auto through = [&](auto* k, auto* v) {
    append_and_attend(layer, rows, index, k, v, store.block_stride(), out, keep);
  };
  if (store.format() == KvFormat::kFp8)
    through(store.template k<Float8>(store_layer), store.template v<Float8>(store_layer));
  else
    through(store.k(store_layer), store.v(store_layer));
  if (!layer.post_attention_norm.weight) {
    linear(layer.out, rows.count, out, x, true);
    return;
  }
  Buffer<T>& projected = keep ? keep->post_attention_in : projected_;
  projected.reserve_discard(to_size(rows.count * D));
  linear(layer.out, rows.count, out, projected.data(), false);
  ops_.norm(norm_args(layer.post_attention_norm, projected.data(), normed_.data(), nullptr, nullptr),
            rows.count);
  ops_.add(x, normed_.data(), rows.count * D);
}

template <class T>
void DecoderRunner<T>::mlp_block(const LayerWeights<T>& layer, std::int64_t rows, T* x,
                                 LayerActivations<T>* keep) {
  const std::int64_t D = config_.hidden_size, F = config_.intermediate_size;
  Buffer<T>& gate_up = keep ? keep->gate_up : gate_up_;
  normed_.reserve_discard(to_size(rows * D));
  gate_up.reserve_discard(to_size(rows * mlp_width()));
  hidden_.reserve_discard(to_size(rows * F));
  if (keep) {
    keep->middle.reserve_discard(to_size(rows * D));
    keep->mlp_mean.reserve_discard(to_size(rows));
    keep->mlp_rstd.reserve_discard(to_size(rows));
    ops_.copy(keep->middle.data(), x, rows * D);
  }
  const kernels::NormArgs<T> norm =
      norm_args(layer.mlp_norm, x, normed_.data(), keep ? keep->mlp_mean.data() : nullptr,
                keep ? keep->mlp_rstd.data() : nullptr);
  if (keep || !config_.gated_mlp ||
      !try_few_rows({{x, D, layer.gate_up.weight, layer.gate_up.bias, hidden_.data(), F, D, false},
                     rows,
                     norm,
                     true,
                     activation_kind()},
                    layer.gate_up)) {
    ops_.norm(norm, rows);
    linear(layer.gate_up, rows, normed_.data(), gate_up.data(), false);
    ops_.activation({gate_up.data(), hidden_.data(), F, activation_kind()}, rows);
  }
  if (!layer.post_mlp_norm.weight) {
    linear(layer.down, rows, hidden_.data(), x, true);
    return;
  }
  Buffer<T>& projected = keep ? keep->post_mlp_in : projected_;
  projected.reserve_discard(to_size(rows * D));
  linear(layer.down, rows, hidden_.data(), projected.data(), false);
  ops_.norm(norm_args(layer.post_mlp_norm, projected.data(), normed_.data(), nullptr, nullptr), rows);
  ops_.add(x, normed_.data(), rows * D);
}

template <class T>
void DecoderRunner<T>::forward_layers(const DecoderWeights<T>& weights, const Rows& rows, std::int64_t first,
                                      std::int64_t last, KvStore<T>& store, std::int64_t store_base, T* x,
                                      std::vector<LayerActivations<T>>* activations) {
  if (rows.size() == 0) return;
  RLHF_CHECK(!activations || store.format() == KvFormat::kAuto,
             "decoder: there is no backward pass from K and V in fp8");
  const kernels::PassRows view = place(rows, Upload::kUnlessThere);
  grow_rope_table(view.max_keys);
  count_attention(rows.positions, first, last, 2);
  while (activations && static_cast<std::int64_t>(activations->size()) < last - first)
    activations->emplace_back(ops_.buffers());
  for (std::int64_t l = first; l < last; ++l) {
    const LayerWeights<T>& layer = weights.layers[static_cast<std::size_t>(l)];
    if (weights.stream) weights.stream->use(l);
    LayerActivations<T>* keep = activations ? &(*activations)[static_cast<std::size_t>(l - first)] : nullptr;
    attention_block(layer, view, l, store, l - store_base, x, keep);
    mlp_block(layer, view.count, x, keep);
  }
}

template <class T>
void DecoderRunner<T>::final_norm(const DecoderWeights<T>& weights, std::int64_t rows, const T* x, T* y,
                                  Wide<T>* mean, Wide<T>* rstd) {
  ops_.norm(norm_args(weights.final_norm, x, y, mean, rstd), rows);
}

template class KvStore<float>;
template class KvStore<double>;
template class KvStore<Bfloat16>;
template struct LayerActivations<float>;
template struct LayerActivations<double>;
template struct LayerActivations<Bfloat16>;
template class DecoderRunner<float>;
template class DecoderRunner<double>;
template class DecoderRunner<Bfloat16>;

}  // namespace rlhf

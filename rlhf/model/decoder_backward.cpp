// The backward program of DecoderRunner. Normed inputs and MLP activations are recomputed from what forward
// kept: they cost one elementwise pass and would take a quarter of the memory.
#include <algorithm>

#include "rlhf/core/error.h"
#include "rlhf/model/decoder.h"

namespace rlhf {

using kernels::kBlockTokens;

template <class T>
void DecoderRunner<T>::mlp_backward(const LayerWeights<T>& layer, std::int64_t rows, T* dx,
                                    LayerActivations<T>& kept) {
  const std::int64_t D = config_.hidden_size, F = config_.intermediate_size;
  const auto size = [](std::int64_t n) { return static_cast<std::size_t>(n); };
  normed_.reserve_discard(size(rows * D));
  hidden_.reserve_discard(size(rows * F));
  dhidden_.reserve_discard(size(rows * F));
  dgate_up_.reserve_discard(size(rows * mlp_width()));
  dnormed_.reserve_discard(size(rows * D));
  const T* dout = dx;
  if (layer.post_mlp_norm.weight) {
    drow_.reserve_discard(size(rows * D + rows));
    T* rstd = drow_.data() + rows * D;
    compute_.norm(norm_args(layer.post_mlp_norm, kept.post_mlp_in.data(), normed_.data(), nullptr, rstd),
                  rows);
    std::fill_n(drow_.data(), rows * D, T(0));
    compute_.norm_grad(
        norm_grad_args(layer.post_mlp_norm, dx, kept.post_mlp_in.data(), nullptr, rstd, drow_.data(), rows));
    dout = drow_.data();
  }
  compute_.activation({kept.gate_up.data(), hidden_.data(), F, activation_kind()}, rows);
  linear_backward(layer.down, rows, hidden_.data(), dout, dhidden_.data(), false);
  compute_.activation_grad({kept.gate_up.data(), dhidden_.data(), dgate_up_.data(), F, activation_kind()},
                           rows);
  compute_.norm(norm_args(layer.mlp_norm, kept.middle.data(), normed_.data(), kept.mlp_mean.data(),
                          kept.mlp_rstd.data()),
                rows);
  linear_backward(layer.gate_up, rows, normed_.data(), dgate_up_.data(), dnormed_.data(), false);
  compute_.norm_grad(norm_grad_args(layer.mlp_norm, dnormed_.data(), kept.middle.data(), kept.mlp_mean.data(),
                                    kept.mlp_rstd.data(), dx, rows));
}

// Gradient of the per-head norms of q and k, in place on dqkv.
template <class T>
void DecoderRunner<T>::qk_norm_backward(const LayerWeights<T>& layer, std::int64_t rows, const T* raw,
                                        T* dqkv) {
  const std::int64_t H = config_.head_dim, N = config_.num_heads, G = config_.num_kv_heads,
                     width = qkv_width();
  std::vector<T> gradient(static_cast<std::size_t>(N * H)), rstd(static_cast<std::size_t>(N)),
      normed(static_cast<std::size_t>(N * H));
  for (std::int64_t t = 0; t < rows; ++t) {
    const auto one = [&](const NormWeights<T>& norm, std::int64_t offset, std::int64_t heads) {
      const T* x = raw + t * width + offset;
      T* d = dqkv + t * width + offset;
      compute_.table().norm({x, norm.weight, nullptr, normed.data(), nullptr, rstd.data(), H,
                             config_.norm_eps, false, config_.norm_plus_one},
                            0, heads);
      std::fill(gradient.begin(), gradient.end(), T(0));
      const kernels::NormGradArgs<T> args{
          d,       x,     norm.weight, nullptr, rstd.data(),          gradient.data(), norm.dweight,
          nullptr, heads, H,           false,   config_.norm_plus_one};
      compute_.table().norm_grad_input(args, 0, heads);
      if (norm.dweight) compute_.table().norm_grad_weight(args, 0, H);
      std::copy_n(gradient.data(), heads * H, d);
    };
    one(layer.q_norm, 0, N);
    one(layer.k_norm, N * H, G);
  }
}

template <class T>
void DecoderRunner<T>::attention_backward(const LayerWeights<T>& layer, const PackedRows& packed,
                                          std::int64_t index, T* k, T* v, std::int64_t block_stride, T* dx,
                                          LayerActivations<T>& kept) {
  const Rows& rows = packed.rows();
  const std::int64_t rows_count = rows.size(), D = config_.hidden_size, H = config_.head_dim;
  const std::int64_t N = config_.num_heads, G = config_.num_kv_heads, width = qkv_width();
  const auto size = [](std::int64_t n) { return static_cast<std::size_t>(n); };
  const std::int64_t kv_elements = packed.num_blocks() * block_stride;
  dattention_.reserve_discard(size(rows_count * N * H));
  dqkv_.reserve_discard(size(rows_count * width));
  dk_.reserve_discard(size(kv_elements));
  dv_.reserve_discard(size(kv_elements));
  normed_.reserve_discard(size(rows_count * D));
  dnormed_.reserve_discard(size(rows_count * D));
  const T* dout = dx;
  if (layer.post_attention_norm.weight) {
    drow_.reserve_discard(size(rows_count * D + rows_count));
    T* rstd = drow_.data() + rows_count * D;
    compute_.norm(
        norm_args(layer.post_attention_norm, kept.post_attention_in.data(), normed_.data(), nullptr, rstd),
        rows_count);
    std::fill_n(drow_.data(), rows_count * D, T(0));
    compute_.norm_grad(norm_grad_args(layer.post_attention_norm, dx, kept.post_attention_in.data(), nullptr,
                                      rstd, drow_.data(), rows_count));
    dout = drow_.data();
  }
  linear_backward(layer.out, rows_count, kept.attention.data(), dout, dattention_.data(), false);

  // One task per tree and kv head: the rows of a tree add to the same dK and dV, in order.
  std::fill_n(dk_.data(), kv_elements, T(0));
  std::fill_n(dv_.data(), kv_elements, T(0));
  const kernels::AttentionArgs<T> args = attention_args(k, v, block_stride);
  const std::int64_t trees = static_cast<std::int64_t>(packed.trees().size());
  compute_.pool().parallel_for(trees * G, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t g = task % G;
      static thread_local std::vector<kernels::AttentionGradRow<T>> tree;
      tree.clear();
      for (const std::int64_t t : packed.trees()[size(task / G)]) {
        const std::int64_t position = rows.positions[size(t)];
        tree.push_back({kept.q.data() + t * N * H, kept.attention.data() + t * N * H,
                        dattention_.data() + t * N * H, kept.lse.data() + t * N, dqkv_.data() + t * width,
                        rows.tables[size(t)], first_key(index, position), position + 1});
      }
      compute_.table().attention_grad(args, tree.data(), static_cast<std::int64_t>(tree.size()), dk_.data(),
                                      dv_.data(), g);
    }
  });
  const bool rotate = config_.layer_uses_rope[size(index)] && !config_.learned_positions;
  const kernels::RopeArgs<T> rope{dqkv_.data(),          width, N + G, H, cos_.data(), sin_.data(),
                                  rows.positions.data(), true};
  compute_.for_rows(rows_count, 4 * width, [&](std::int64_t t) {
    const std::int64_t position = rows.positions[size(t)], slot = position % kBlockTokens;
    T* key = dqkv_.data() + t * width + N * H;
    T* value = key + G * H;
    std::fill_n(key, 2 * G * H, T(0));
    const auto add = [&](std::int32_t block) {
      for (std::int64_t g = 0; g < G; ++g) {
        const T* k_block = dk_.data() + block * block_stride + g * H * kBlockTokens + slot;
        const T* v_block = dv_.data() + block * block_stride + (g * kBlockTokens + slot) * H;
        for (std::int64_t h = 0; h < H; ++h) key[g * H + h] += k_block[h * kBlockTokens];
        for (std::int64_t h = 0; h < H; ++h) value[g * H + h] += v_block[h];
      }
    };
    add(rows.tables[size(t)][position / kBlockTokens]);
    for (const std::int32_t block : rows.copies_of(t)) add(block);
    if (rotate) compute_.table().rope(rope, t, t + 1);
  });
  if (layer.q_norm.weight) qk_norm_backward(layer, rows_count, kept.qkv_raw.data(), dqkv_.data());
  compute_.norm(norm_args(layer.attention_norm, kept.input.data(), normed_.data(), kept.attention_mean.data(),
                          kept.attention_rstd.data()),
                rows_count);
  linear_backward(layer.qkv, rows_count, normed_.data(), dqkv_.data(), dnormed_.data(), false);
  compute_.norm_grad(norm_grad_args(layer.attention_norm, dnormed_.data(), kept.input.data(),
                                    kept.attention_mean.data(), kept.attention_rstd.data(), dx, rows_count));
}

template <class T>
void DecoderRunner<T>::backward_layers(const DecoderWeights<T>& weights, const PackedRows& packed,
                                       std::int64_t first, std::int64_t last, KvStore<T>& store,
                                       std::int64_t store_base, T* dx,
                                       std::vector<LayerActivations<T>>& activations) {
  for (std::int64_t l = last - 1; l >= first; --l) {
    const LayerWeights<T>& layer = weights.layers[static_cast<std::size_t>(l)];
    LayerActivations<T>& kept = activations[static_cast<std::size_t>(l - first)];
    mlp_backward(layer, packed.rows().size(), dx, kept);
    attention_backward(layer, packed, l, store.k(l - store_base), store.v(l - store_base),
                       store.block_stride(), dx, kept);
  }
}

template <class T>
void DecoderRunner<T>::backward_embed(const DecoderWeights<T>& weights, const Rows& rows, const T* dx) {
  if (!weights.dembedding && !weights.dpositions) return;
  const std::int64_t D = config_.hidden_size;
  const T scale = static_cast<T>(config_.embedding_scale);
  // Tokens repeat, so threads split the width, not the rows.
  compute_.pool().parallel_for(D, 64, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = 0; t < rows.size(); ++t) {
      const T* d = dx + t * D;
      const TokenId token = rows.tokens[static_cast<std::size_t>(t)];
      if (weights.dembedding && token != config_.fixed_embedding) {
        T* row = weights.dembedding + token * D;
        for (std::int64_t i = begin; i < end; ++i) row[i] += d[i] * scale;
      }
      if (weights.dpositions) {
        T* row = weights.dpositions + rows.positions[static_cast<std::size_t>(t)] * D;
        for (std::int64_t i = begin; i < end; ++i) row[i] += d[i];
      }
    }
  });
}

template void DecoderRunner<float>::mlp_backward(const LayerWeights<float>&, std::int64_t, float*,
                                                 LayerActivations<float>&);
template void DecoderRunner<double>::mlp_backward(const LayerWeights<double>&, std::int64_t, double*,
                                                  LayerActivations<double>&);
template void DecoderRunner<float>::backward_layers(const DecoderWeights<float>&, const PackedRows&,
                                                    std::int64_t, std::int64_t, KvStore<float>&, std::int64_t,
                                                    float*, std::vector<LayerActivations<float>>&);
template void DecoderRunner<double>::backward_layers(const DecoderWeights<double>&, const PackedRows&,
                                                     std::int64_t, std::int64_t, KvStore<double>&,
                                                     std::int64_t, double*,
                                                     std::vector<LayerActivations<double>>&);
template void DecoderRunner<float>::backward_embed(const DecoderWeights<float>&, const Rows&, const float*);
template void DecoderRunner<double>::backward_embed(const DecoderWeights<double>&, const Rows&,
                                                    const double*);

}  // namespace rlhf

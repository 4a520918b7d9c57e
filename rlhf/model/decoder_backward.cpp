// The backward program of DecoderRunner. Normed inputs and MLP activations are recomputed from what forward
// kept: they cost one elementwise pass and would take a quarter of the memory.
#include <algorithm>
#include <optional>

#include "rlhf/core/error.h"
#include "rlhf/model/decoder.h"
#include "rlhf/model/gradient_sink.h"

namespace rlhf {

RowGroups group_rows(const std::vector<std::int32_t>& keys, std::optional<std::int32_t> without) {
  RowGroups groups;
  for (std::size_t t = 0; t < keys.size(); ++t)
    if (keys[t] != without) groups.order.push_back(static_cast<std::int64_t>(t));
  const auto key = [&](std::int64_t t) { return keys[static_cast<std::size_t>(t)]; };
  std::ranges::stable_sort(groups.order, {}, key);
  for (std::size_t i = 0; i < groups.order.size(); ++i) {
    if (!groups.keys.empty() && key(groups.order[i]) == groups.keys.back()) continue;
    groups.keys.push_back(key(groups.order[i]));
    groups.offsets.push_back(static_cast<std::int64_t>(i));
  }
  groups.offsets.push_back(static_cast<std::int64_t>(groups.order.size()));
  return groups;
}

template <class T>
void DecoderRunner<T>::add_to_table(Wide<T>* table, double scale, const RowGroups& groups, const T* rows) {
  const auto add = [&](const std::int32_t* keys, const std::int64_t* offsets, const std::int64_t* order) {
    ops_.embed_grad({rows, table, config_.hidden_size, scale, static_cast<std::int64_t>(groups.keys.size()),
                     keys, offsets, order});
  };
  if (!ops_.memory()) return add(groups.keys.data(), groups.offsets.data(), groups.order.data());
  if (!row_groups_) row_groups_.emplace(*ops_.memory());
  row_groups_->clear();
  const auto keys = row_groups_->add(groups.keys);
  const auto offsets = row_groups_->add(groups.offsets), order = row_groups_->add(groups.order);
  row_groups_->reserve();
  row_groups_->upload();
  add(row_groups_->device(keys), row_groups_->device(offsets), row_groups_->device(order));
}

template <class T>
void DecoderRunner<T>::mlp_backward(const LayerWeights<T>& layer, std::int64_t rows, T* dx,
                                    LayerActivations<T>& kept) {
  const std::int64_t D = config_.hidden_size, F = config_.intermediate_size;
  normed_.reserve_discard(to_size(rows * D));
  hidden_.reserve_discard(to_size(rows * F));
  dhidden_.reserve_discard(to_size(rows * F));
  dgate_up_.reserve_discard(to_size(rows * mlp_width()));
  dnormed_.reserve_discard(to_size(rows * D));
  const T* dout = dx;
  if (layer.post_mlp_norm.weight) {
    drow_.reserve_discard(to_size(rows * D));
    drow_rstd_.reserve_discard(to_size(rows));
    Wide<T>* rstd = drow_rstd_.data();
    ops_.norm(norm_args(layer.post_mlp_norm, kept.post_mlp_in.data(), normed_.data(), nullptr, rstd), rows);
    ops_.zero(drow_.data(), to_size(rows * D) * sizeof(T));
    ops_.norm_grad(
        norm_grad_args(layer.post_mlp_norm, dx, kept.post_mlp_in.data(), nullptr, rstd, drow_.data(), rows));
    dout = drow_.data();
  }
  ops_.activation({kept.gate_up.data(), hidden_.data(), F, activation_kind()}, rows);
  linear_backward(layer.down, rows, hidden_.data(), dout, dhidden_.data(), false);
  ops_.activation_grad({kept.gate_up.data(), dhidden_.data(), dgate_up_.data(), F, activation_kind()}, rows);
  ops_.norm(norm_args(layer.mlp_norm, kept.middle.data(), normed_.data(), kept.mlp_mean.data(),
                      kept.mlp_rstd.data()),
            rows);
  linear_backward(layer.gate_up, rows, normed_.data(), dgate_up_.data(), dnormed_.data(), false);
  ops_.norm_grad(norm_grad_args(layer.mlp_norm, dnormed_.data(), kept.middle.data(), kept.mlp_mean.data(),
                                kept.mlp_rstd.data(), dx, rows));
}

template <class T>
void DecoderRunner<T>::attention_backward(const LayerWeights<T>& layer, const BackwardRows& packed,
                                          std::int64_t index, T* k, T* v, std::int64_t block_stride, T* dx,
                                          LayerActivations<T>& kept) {
  const kernels::PassRows& rows = packed.rows;
  const std::int64_t rows_count = rows.count, D = config_.hidden_size, H = config_.head_dim;
  const std::int64_t N = config_.num_heads, G = config_.num_kv_heads, width = qkv_width();
  const std::int64_t kv_elements = packed.uses.num_blocks * block_stride;
  dattention_.reserve_discard(to_size(rows_count * N * H));
  dqkv_.reserve_discard(to_size(rows_count * width));
  dk_.reserve_discard(to_size(kv_elements));
  dv_.reserve_discard(to_size(kv_elements));
  normed_.reserve_discard(to_size(rows_count * D));
  dnormed_.reserve_discard(to_size(rows_count * D));
  const T* dout = dx;
  if (layer.post_attention_norm.weight) {
    drow_.reserve_discard(to_size(rows_count * D));
    drow_rstd_.reserve_discard(to_size(rows_count));
    Wide<T>* rstd = drow_rstd_.data();
    ops_.norm(
        norm_args(layer.post_attention_norm, kept.post_attention_in.data(), normed_.data(), nullptr, rstd),
        rows_count);
    ops_.zero(drow_.data(), to_size(rows_count * D) * sizeof(T));
    ops_.norm_grad(norm_grad_args(layer.post_attention_norm, dx, kept.post_attention_in.data(), nullptr, rstd,
                                  drow_.data(), rows_count));
    dout = drow_.data();
  }
  linear_backward(layer.out, rows_count, kept.attention.data(), dout, dattention_.data(), false);

  if (ops_.memory())
    workspace_.reserve_discard(to_size(std::max(rows_count * N, kernels::head_norm_workspace(H))));
  ops_.attention_grad({attention_args(k, v, block_stride), kept.q.data(), kept.attention.data(),
                       dattention_.data(), kept.lse.data(), dqkv_.data(), width, dk_.data(), dv_.data(),
                       window(index), packed.uses, packed.trees, workspace_.data()},
                      rows);
  const bool rotate = rotates(index);
  ops_.append_grad({dqkv_.data(), kept.qkv_raw.data(), dk_.data(), dv_.data(), block_stride, N, G, H,
                    layer.q_norm.weight, layer.k_norm.weight, layer.q_norm.dweight, layer.k_norm.dweight,
                    config_.norm_eps, config_.norm_plus_one, rotate ? cos_.data() : nullptr,
                    rotate ? sin_.data() : nullptr, workspace_.data()},
                   rows);
  ops_.norm(norm_args(layer.attention_norm, kept.input.data(), normed_.data(), kept.attention_mean.data(),
                      kept.attention_rstd.data()),
            rows_count);
  linear_backward(layer.qkv, rows_count, normed_.data(), dqkv_.data(), dnormed_.data(), false);
  ops_.norm_grad(norm_grad_args(layer.attention_norm, dnormed_.data(), kept.input.data(),
                                kept.attention_mean.data(), kept.attention_rstd.data(), dx, rows_count));
}

template <class T>
void DecoderRunner<T>::backward_layers(const DecoderWeights<T>& weights, const PackedRows& packed,
                                       std::int64_t first, std::int64_t last, KvStore<T>& store,
                                       std::int64_t store_base, T* dx,
                                       std::vector<LayerActivations<T>>& activations) {
  if (ops_.memory() && !device_uses_) device_uses_.emplace(*ops_.memory());
  const BackwardRows rows{place(packed.rows(), Upload::kUnlessThere),
                          device_uses_ ? device_uses_->place(packed) : packed.block_uses(),
                          packed.row_trees()};
  count_attention(packed.rows().positions, first, last, 5);
  for (std::int64_t l = last - 1; l >= first; --l) {
    const LayerWeights<T>& layer = weights.layers[static_cast<std::size_t>(l)];
    LayerActivations<T>& kept = activations[static_cast<std::size_t>(l - first)];
    mlp_backward(layer, rows.rows.count, dx, kept);
    attention_backward(layer, rows, l, store.k(l - store_base), store.v(l - store_base), store.block_stride(),
                       dx, kept);
    if (weights.gradient_sink) weights.gradient_sink->layer_done(l);
  }
}

template <class T>
void DecoderRunner<T>::backward_embed(const DecoderWeights<T>& weights, const Rows& rows, const T* dx) {
  if (!weights.dembedding && !weights.dpositions) return;
  const RowGroups tokens = group_rows(rows.tokens, config_.fixed_embedding),
                  positions = group_rows(rows.positions, {});
  const auto add = [&](Wide<T>* table, double scale, const RowGroups& groups) {
    if (table) add_to_table(table, scale, groups, dx);
  };
  add(weights.dembedding, config_.embedding_scale, tokens);
  add(weights.dpositions, 1, positions);
}

#define RLHF_INSTANTIATE(T)                                                                                  \
  template void DecoderRunner<T>::mlp_backward(const LayerWeights<T>&, std::int64_t, T*,                     \
                                               LayerActivations<T>&);                                        \
  template void DecoderRunner<T>::backward_layers(const DecoderWeights<T>&, const PackedRows&, std::int64_t, \
                                                  std::int64_t, KvStore<T>&, std::int64_t, T*,               \
                                                  std::vector<LayerActivations<T>>&);                        \
  template void DecoderRunner<T>::backward_embed(const DecoderWeights<T>&, const Rows&, const T*);           \
  template void DecoderRunner<T>::add_to_table(Wide<T>*, double, const RowGroups&, const T*);
RLHF_INSTANTIATE(float)
RLHF_INSTANTIATE(double)
RLHF_INSTANTIATE(Bfloat16)

}  // namespace rlhf

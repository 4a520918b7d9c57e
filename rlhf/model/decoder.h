#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "rlhf/core/ids.h"
#include "rlhf/kernels/device_ops.h"
#include "rlhf/kernels/kv_format.h"
#include "rlhf/kernels/packed_matrix.h"
#include "rlhf/model/decoder_weights.h"
#include "rlhf/model/device_rows.h"
#include "rlhf/model/packed_rows.h"
#include "rlhf/tensor/buffer.h"

namespace rlhf {

class Arena;

/// K and V of all layers in blocks of kernels::kBlockTokens tokens. One layer's K (and V) is
/// [num_blocks][G][H][block] ([G][block][H] for V). Decoding keeps it across steps, training for one
/// micro-batch. In KvFormat::kFp8 elements are Float8, with scales (rlhf/kernels/layout.h), for forward
/// passes only.
template <class T>
class KvStore {
 public:
  KvStore() = default;
  /// A store of its own, layer by layer.
  /// @param memory of the device that reads it; null = the process's own
  KvStore(const ModelConfig& config, std::int64_t num_layers, std::int64_t num_blocks,
          DeviceMemory* memory = nullptr);
  /// A store in an arena's slabs: one a block, K and V of all layers together at its beginning.
  /// @param memory of the device that the arena lies on; null = the process's own
  KvStore(const ModelConfig& config, std::int64_t num_layers, const Arena& arena, DeviceMemory* memory,
          KvFormat format = KvFormat::kAuto);

  KvFormat format() const { return format_; }
  /// @tparam E Float8 in KvFormat::kFp8, else T
  template <class E = T>
  E* k(std::int64_t layer) {
    return (in_slabs_ ? static_cast<E*>(in_slabs_) : own<E>(k_)) + layer * layer_stride_;
  }
  template <class E = T>
  E* v(std::int64_t layer) {
    return (in_slabs_ ? static_cast<E*>(in_slabs_) + kv_elements_ : own<E>(v_)) + layer * layer_stride_;
  }
  /// Elements from a block to the next; negative where slabs go down.
  std::int64_t block_stride() const { return block_stride_; }
  /// Bytes of its own.
  std::size_t bytes() const { return k_.bytes() + v_.bytes(); }
  /// Bytes that one block takes over all layers, as a slab.
  static std::size_t block_bytes(const ModelConfig& config, std::int64_t num_layers,
                                 KvFormat format = KvFormat::kAuto);
  /// Copies one block in all layers.
  void copy_block(std::int64_t from, std::int64_t to);
  /// Makes room for `num_blocks` in a store of its own; contents are lost when it grows.
  void reserve_discard(std::int64_t num_blocks);

 private:
  template <class E>
  E* own(Buffer<T>& buffer) {
    return static_cast<E*>(static_cast<void*>(buffer.data()));
  }
  std::size_t element_bytes() const { return format_ == KvFormat::kFp8 ? sizeof(Float8) : sizeof(T); }

  KvFormat format_ = KvFormat::kAuto;
  std::int64_t kv_elements_ = 0;  ///< of K, or V, of one block and layer
  std::int64_t block_stride_ = 0, layer_stride_ = 0, num_layers_ = 0, num_blocks_ = 0;
  DeviceMemory* memory_ = nullptr;
  void* in_slabs_ = nullptr;
  Buffer<T> k_, v_;
};

/// Rows with equal keys: those of keys[s] are order[offsets[s]] .. order[offsets[s + 1]).
struct RowGroups {
  std::vector<std::int32_t> keys;
  std::vector<std::int64_t> offsets, order;
};
/// @param without rows with this key are left out
RowGroups group_rows(const std::vector<std::int32_t>& keys, std::optional<std::int32_t> without = {});

/// What the backward pass of one layer needs.
template <class T>
struct LayerActivations {
  LayerActivations() = default;
  explicit LayerActivations(DeviceMemory* memory);
  std::size_t bytes() const;

  Buffer<T> input, q, attention, middle, gate_up;
  Buffer<Wide<T>> lse, attention_mean, attention_rstd, mlp_mean, mlp_rstd;
  Buffer<T> qkv_raw;                         ///< before q/k norm, only with qk_norm
  Buffer<T> post_attention_in, post_mlp_in;  ///< inputs of the post norms, only with post_norms
};

/// The forward and backward programs of a decoder over Rows. Decoding, prefill, scoring and training all run
/// `forward_layers`; only the K/V store and what is kept differ, so sampler and trainer compute equal
/// log-probs. All pointers are of the runner's device. Owns scratch memory that is reused from call to call;
/// not thread-safe, one per lane. T is float or double on the CPU, float or Bfloat16 on another device.
template <class T>
class DecoderRunner {
 public:
  DecoderRunner(const ModelConfig& config, Compute<T> compute) requires(!std::is_same_v<T, Bfloat16>)
      : DecoderRunner(config, DeviceOps<T>(compute)) {}
  DecoderRunner(const ModelConfig& config, DeviceOps<T> ops);

  /// On the CPU only.
  const Compute<T>& compute() const { return ops_.compute(); }

  /// Writes token (+ position) embeddings of all rows to x[T, D]. On a device other than the CPU it also
  /// uploads the rows, unless that has been done: there it comes first for every new content of `rows`.
  enum class Upload { kAlways, kUnlessThere };
  void embed(const DecoderWeights<T>& weights, const Rows& rows, T* x, Upload upload = Upload::kAlways);
  /// Uploads rows of a pass that may be recorded, on a device other than the CPU.
  /// @param max_keys kernels are queued as if the longest row saw so many keys, or more where one does
  void upload(const Rows& rows, std::int64_t max_keys);
  /// Runs layers [first, last) on x[T, D] in place, with K/V in store layers [first - store_base, ...). When
  /// `activations` is given, layer l keeps what backward needs in activations[l - first].
  void forward_layers(const DecoderWeights<T>& weights, const Rows& rows, std::int64_t first,
                      std::int64_t last, KvStore<T>& store, std::int64_t store_base, T* x,
                      std::vector<LayerActivations<T>>* activations);
  /// y[T, D] = final norm of x[T, D]; rstd and mean (may be null) are kept for backward.
  void final_norm(const DecoderWeights<T>& weights, std::int64_t rows, const T* x, T* y, Wide<T>* mean,
                  Wide<T>* rstd);

  /// Backward of layers [first, last): dx[T, D] holds d loss / d output and ends as d loss / d input.
  void backward_layers(const DecoderWeights<T>& weights, const PackedRows& packed, std::int64_t first,
                       std::int64_t last, KvStore<T>& store, std::int64_t store_base, T* dx,
                       std::vector<LayerActivations<T>>& activations);
  void backward_embed(const DecoderWeights<T>& weights, const Rows& rows, const T* dx);
  /// table[groups.keys[s]] += scale * the sum of the group's rows [., D].
  void add_to_table(Wide<T>* table, double scale, const RowGroups& groups, const T* rows);

  /// Floating-point operations of the matrix products and of attention so far, two a multiply-add, by their
  /// definition: what a kernel computes beyond it (masked keys of a tile) is left out, what a caller computes
  /// twice is in.
  double matmul_flops() const { return matmul_flops_; }

  /// Counts what forward_layers over all layers computes, for a pass that was recorded.
  void count_layers(const DecoderWeights<T>& weights, const Rows& rows);
  /// Counts `products` products with the head's weights that its caller has computed.
  void count_head(const DecoderWeights<T>& weights, std::int64_t rows, int products) {
    count_products(rows, products * weights.head.N * weights.head.K);
  }

  /// Bytes of scratch memory: what the largest call so far has needed.
  std::size_t scratch_bytes() const;
  /// Where the scratch memory lies: a recorded pass can be replayed while that is the same.
  std::vector<const void*> scratch_addresses() const;
  /// Gives the scratch memory back; the next call makes it again.
  void release_scratch();

  /// y (+)= x W^T + b with adapters, for `rows` rows. Packed weights are read on the CPU only.
  void linear(const LinearWeights<T>& w, std::int64_t rows, const T* x, T* y, bool accumulate);
  /// Computes a product with w in one kernel where that is worth it. @return whether it did
  bool try_few_rows(const kernels::FewRowsArgs<T>& args, const LinearWeights<T>& w);
  /// dx (+)= dy W; adds to dW, db and the adapters' gradients where they are trained.
  void linear_backward(const LinearWeights<T>& w, std::int64_t rows, const T* x, const T* dy, T* dx,
                       bool accumulate);

 private:
  /// A pass's rows for the backward pass, on the runner's device.
  struct BackwardRows {
    kernels::PassRows rows;
    kernels::BlockUses uses;
    kernels::RowTrees trees;  ///< on the CPU
  };

  void attention_block(const LayerWeights<T>& layer, const kernels::PassRows& rows, std::int64_t index,
                       KvStore<T>& store, std::int64_t store_layer, T* x, LayerActivations<T>* keep);
  /// From qkv_ to `out`, through the K and V of a layer.
  template <class E>
  void append_and_attend(const LayerWeights<T>& layer, const kernels::PassRows& rows, std::int64_t index,
                         E* k, E* v, std::int64_t block_stride, T* out, LayerActivations<T>* keep);
  void mlp_block(const LayerWeights<T>& layer, std::int64_t rows, T* x, LayerActivations<T>* keep);
  void mlp_backward(const LayerWeights<T>& layer, std::int64_t rows, T* dx, LayerActivations<T>& kept);
  void attention_backward(const LayerWeights<T>& layer, const BackwardRows& packed, std::int64_t index, T* k,
                          T* v, std::int64_t block_stride, T* dx, LayerActivations<T>& kept);
  void grow_rope_table(std::int64_t positions);
  kernels::NormArgs<T> norm_args(const NormWeights<T>& norm, const T* x, T* y, Wide<T>* mean,
                                 Wide<T>* rstd) const;
  kernels::NormGradArgs<T> norm_grad_args(const NormWeights<T>& norm, const T* dy, const T* x,
                                          const Wide<T>* mean, const Wide<T>* rstd, T* dx,
                                          std::int64_t rows) const;
  template <class E>
  kernels::AttentionArgs<T, E> attention_args(const E* k, const E* v, std::int64_t block_stride) const {
    return {k,
            v,
            block_stride,
            config_.num_heads,
            config_.num_kv_heads,
            config_.head_dim,
            config_.attention_scale,
            config_.attention_softcap};
  }
  std::int64_t window(std::int64_t layer) const {
    return config_.layer_window[static_cast<std::size_t>(layer)];
  }
  bool rotates(std::int64_t layer) const {
    return config_.layer_uses_rope[static_cast<std::size_t>(layer)] && !config_.learned_positions;
  }
  kernels::GluKind activation_kind() const;
  void count_products(std::int64_t rows, std::int64_t weights) {
    matmul_flops_ += 2 * static_cast<double>(rows) * static_cast<double>(weights);
  }
  /// `products`: 2 in attention (q k^T, p v), 5 in its backward.
  void count_attention(const std::vector<std::int32_t>& positions, std::int64_t first, std::int64_t last,
                       int products);
  std::int64_t qkv_width() const { return (config_.num_heads + 2 * config_.num_kv_heads) * config_.head_dim; }
  std::int64_t mlp_width() const {
    return config_.gated_mlp ? 2 * config_.intermediate_size : config_.intermediate_size;
  }

  // Of a const or a changeable runner.
  template <class Self>
  static auto scratch_of(Self& self) {
    return std::vector{&self.normed_,  &self.qkv_,        &self.attention_out_, &self.gate_up_,
                       &self.hidden_,  &self.projected_,  &self.low_rank_,      &self.dlow_rank_,
                       &self.dqkv_,    &self.dattention_, &self.dhidden_,       &self.dgate_up_,
                       &self.dnormed_, &self.drow_};
  }
  template <class Self>
  static auto wide_scratch_of(Self& self) {
    return std::vector{&self.workspace_, &self.dk_, &self.dv_, &self.drow_rstd_};
  }
  /// Brings rows to the device; valid until the next call with other rows.
  kernels::PassRows place(const Rows& rows, Upload upload);

  ModelConfig config_;
  DeviceOps<T> ops_;
  Buffer<Wide<T>> cos_, sin_, workspace_, dk_, dv_, drow_rstd_;
  std::int64_t rope_positions_ = 0;
  Buffer<T> normed_, qkv_, attention_out_, gate_up_, hidden_, projected_, low_rank_, dlow_rank_;
  Buffer<T> dqkv_, dattention_, dhidden_, dgate_up_, dnormed_, drow_;
  QuantisedRows quantised_;  ///< of products with int8 weights
  std::optional<DeviceRows> device_rows_;
  const Rows* placed_rows_ = nullptr;  ///< in device_rows_
  std::optional<DeviceBlockUses> device_uses_;
  std::optional<Staging> row_groups_;
  double matmul_flops_ = 0;
};

/// Angle frequencies of rotary embedding (after `scaling`), [head_dim / 2].
std::vector<double> rope_frequencies(const ModelConfig& config);

}  // namespace rlhf

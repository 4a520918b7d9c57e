#include "benchmarks/eager_llama.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/cos.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/outer.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/rms_norm.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/sin.h>

#include "rlhf/core/error.h"

namespace rlhf::eager {

Llama::Llama(const ModelConfig& config, at::ScalarType type) : config_(config), type_(type) {
  RLHF_CHECK(config.architecture == Architecture::kLlama && config.rope.scaling == RopeScaling::kNone &&
                 !config.scalar_head && !config.attention_qkv_bias && !config.mlp_bias,
             "eager::Llama: expected a llama language model without biases and without rope scaling");
  const std::int64_t D = config.hidden_size, F = config.intermediate_size;
  embedding_ = make("model.embed_tokens.weight", {config.vocab_size, D});
  for (std::int64_t l = 0; l < config.num_layers; ++l) {
    const std::string at = concat("model.layers.", l, ".");
    Layer layer;
    layer.input_norm = make(at + "input_layernorm.weight", {D});
    layer.q = make(at + "self_attn.q_proj.weight", {config.query_width(), D});
    layer.k = make(at + "self_attn.k_proj.weight", {config.kv_width(), D});
    layer.v = make(at + "self_attn.v_proj.weight", {config.kv_width(), D});
    layer.out = make(at + "self_attn.o_proj.weight", {D, config.query_width()});
    layer.mlp_norm = make(at + "post_attention_layernorm.weight", {D});
    layer.gate = make(at + "mlp.gate_proj.weight", {F, D});
    layer.up = make(at + "mlp.up_proj.weight", {F, D});
    layer.down = make(at + "mlp.down_proj.weight", {D, F});
    layers_.push_back(layer);
  }
  final_norm_ = make("model.norm.weight", {D});
  head_ = config.tied_embeddings ? embedding_ : make("lm_head.weight", {config.vocab_size, D});

  const auto exponents =
      at::arange(0, config.head_dim, 2, at::kDouble) / static_cast<double>(config.head_dim);
  const auto angles = at::outer(at::arange(0, config.max_positions, 1, at::kDouble),
                                at::pow(at::Scalar(config.rope.theta), -exponents));
  const auto both_halves = at::cat(std::vector<at::Tensor>{angles, angles}, 1);
  cos_ = at::cos(both_halves).to(type);
  sin_ = at::sin(both_halves).to(type);
}

at::Tensor Llama::make(const std::string& name, std::vector<std::int64_t> shape) {
  at::Tensor weight = shape.size() == 1 ? at::ones(shape, type_) : at::randn(shape, type_).mul_(0.02);
  parameters_.emplace_back(name, weight);
  return weight;
}

Llama::Cache Llama::make_cache(std::int64_t batch, std::int64_t capacity) const {
  Cache cache;
  for (std::int64_t l = 0; l < config_.num_layers; ++l) {
    cache.k.push_back(at::empty({batch, config_.num_kv_heads, capacity, config_.head_dim}, type_));
    cache.v.push_back(at::empty({batch, config_.num_kv_heads, capacity, config_.head_dim}, type_));
  }
  return cache;
}

at::Tensor Llama::rotate(const at::Tensor& x_BSNH, std::int64_t first_position) const {
  const std::int64_t S = x_BSNH.size(1), half = config_.head_dim / 2;
  const auto cos = cos_.narrow(0, first_position, S).unsqueeze(1);
  const auto sin = sin_.narrow(0, first_position, S).unsqueeze(1);
  const auto turned =
      at::cat(std::vector<at::Tensor>{-x_BSNH.narrow(-1, half, half), x_BSNH.narrow(-1, 0, half)}, -1);
  return x_BSNH * cos + turned * sin;
}

at::Tensor Llama::attention(const Layer& layer, std::size_t index, const at::Tensor& x_BSD,
                            Cache* cache) const {
  const std::int64_t B = x_BSD.size(0), S = x_BSD.size(1), N = config_.num_heads, G = config_.num_kv_heads,
                     H = config_.head_dim;
  const std::int64_t past = cache ? cache->length : 0;
  const auto heads = [&](const at::Tensor& weight, std::int64_t count) {
    return at::linear(x_BSD, weight).view({B, S, count, H});
  };
  const auto q = rotate(heads(layer.q, N), past).transpose(1, 2);
  auto k = rotate(heads(layer.k, G), past).transpose(1, 2);
  auto v = heads(layer.v, G).transpose(1, 2);
  if (cache) {
    cache->k[index].narrow(2, past, S).copy_(k);
    cache->v[index].narrow(2, past, S).copy_(v);
  }
  at::Tensor out_BSD;
  if (S == 1 && past > 0) {
    // The heads that share a kv head are its query rows: nothing has to be repeated.
    k = cache->k[index].narrow(2, 0, past + 1);
    v = cache->v[index].narrow(2, 0, past + 1);
    out_BSD = at::scaled_dot_product_attention(q.reshape({B, G, N / G, H}), k, v).reshape({B, 1, N * H});
  } else {
    RLHF_CHECK(past == 0, "eager::Llama: several tokens after ", past, " in the cache");
    out_BSD = at::scaled_dot_product_attention(q, k, v, {}, 0.0, true, std::nullopt, N != G)
                  .transpose(1, 2)
                  .reshape({B, S, N * H});
  }
  return at::linear(out_BSD, layer.out);
}

at::Tensor Llama::forward(const at::Tensor& ids_BS, Cache* cache) const {
  const auto norm = [&](const at::Tensor& x, const at::Tensor& weight) {
    return at::rms_norm(x, {config_.hidden_size}, weight, config_.norm_eps);
  };
  at::Tensor x_BSD = at::embedding(embedding_, ids_BS);
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    const Layer& layer = layers_[l];
    x_BSD = x_BSD + attention(layer, l, norm(x_BSD, layer.input_norm), cache);
    const auto normed = norm(x_BSD, layer.mlp_norm);
    const auto hidden = at::silu(at::linear(normed, layer.gate)) * at::linear(normed, layer.up);
    x_BSD = x_BSD + at::linear(hidden, layer.down);
  }
  if (cache) cache->length += ids_BS.size(1);
  return norm(x_BSD, final_norm_);
}

at::Tensor Llama::logits(const at::Tensor& hidden) const {
  return at::linear(hidden, head_);
}

}  // namespace rlhf::eager

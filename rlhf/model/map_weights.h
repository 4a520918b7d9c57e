#pragma once

#include <cstdint>

#include "rlhf/model/decoder_weights.h"

namespace rlhf {

/// The weights of a decoder at other addresses, in another type.
/// @param value (const From* host, number of elements) -> const To*; called for every tensor that is there
/// @param gradient (Wide<From>* host, number of elements) -> Wide<To>*; called for every gradient that is
template <class To, class From, class Value, class Gradient>
DecoderWeights<To> map_weights(const DecoderWeights<From>& host, const Value& value,
                               const Gradient& gradient) {
  const auto place = [&](const From* at, std::int64_t count) { return at ? value(at, count) : nullptr; };
  const auto place_gradient = [&](Wide<From>* at, std::int64_t count) {
    return at ? gradient(at, count) : nullptr;
  };
  const auto norm = [&](const NormWeights<From>& from, std::int64_t width) {
    return NormWeights<To>{place(from.weight, width), place(from.bias, width),
                           place_gradient(from.dweight, width), place_gradient(from.dbias, width)};
  };
  const auto linear = [&](const LinearWeights<From>& from) {
    LinearWeights<To> to;
    to.weight = place(from.weight, from.N * from.K);
    to.bias = place(from.bias, from.N);
    to.dweight = place_gradient(from.dweight, from.N * from.K);
    to.dbias = place_gradient(from.dbias, from.N);
    to.N = from.N;
    to.K = from.K;
    for (const LoraWeights<From>& lora : from.adapters)
      to.adapters.push_back({place(lora.a, lora.rank * from.K), place(lora.b, lora.num_rows * lora.rank),
                             place_gradient(lora.da, lora.rank * from.K),
                             place_gradient(lora.db, lora.num_rows * lora.rank), lora.first_row,
                             lora.num_rows, lora.rank, lora.scale});
    return to;
  };
  const ModelConfig& config = host.config;
  const std::int64_t D = config.hidden_size, H = config.head_dim;
  DecoderWeights<To> weights;
  weights.config = config;
  weights.embedding = place(host.embedding, config.vocab_size * D);
  weights.dembedding = place_gradient(host.dembedding, config.vocab_size * D);
  weights.positions = place(host.positions, config.max_positions * D);
  weights.dpositions = place_gradient(host.dpositions, config.max_positions * D);
  for (const LayerWeights<From>& layer : host.layers)
    weights.layers.push_back({norm(layer.attention_norm, D), norm(layer.post_attention_norm, D),
                              norm(layer.mlp_norm, D), norm(layer.post_mlp_norm, D), norm(layer.q_norm, H),
                              norm(layer.k_norm, H), linear(layer.qkv), linear(layer.out),
                              linear(layer.gate_up), linear(layer.down)});
  weights.final_norm = norm(host.final_norm, D);
  weights.head = linear(host.head);
  weights.first_trainable_layer = host.first_trainable_layer;
  weights.embedding_trainable = host.embedding_trainable;
  return weights;
}

}  // namespace rlhf

#include "rlhf/model/device_weights.h"

namespace rlhf {

template <class T>
DeviceWeights<T>::DeviceWeights(DeviceMemory& memory, const DecoderWeights<float>& host) : memory_(&memory) {
  const ModelConfig& config = host.config;
  const std::int64_t D = config.hidden_size, H = config.head_dim;
  weights_.config = config;
  weights_.embedding = place(host.embedding, config.vocab_size * D);
  weights_.dembedding = place_gradient(host.dembedding, config.vocab_size * D);
  weights_.positions = place(host.positions, config.max_positions * D);
  weights_.dpositions = place_gradient(host.dpositions, config.max_positions * D);
  for (const LayerWeights<float>& layer : host.layers)
    weights_.layers.push_back({place(layer.attention_norm, D), place(layer.post_attention_norm, D),
                               place(layer.mlp_norm, D), place(layer.post_mlp_norm, D),
                               place(layer.q_norm, H), place(layer.k_norm, H), place(layer.qkv),
                               place(layer.out), place(layer.gate_up), place(layer.down)});
  weights_.final_norm = place(host.final_norm, D);
  weights_.head = place(host.head);
  weights_.first_trainable_layer = host.first_trainable_layer;
  weights_.embedding_trainable = host.embedding_trainable;
}

template <class T>
const T* DeviceWeights<T>::place(const float* host, std::int64_t count) {
  if (!host) return nullptr;
  Buffer<T>& buffer = values_[host];
  if (buffer.size() == 0) {
    std::vector<T> rounded;
    for (std::int64_t i = 0; i < count; ++i) rounded.push_back(from_float<T>(host[i]));
    buffer = Buffer<T>(rounded.size(), memory_);
    memory_->upload(buffer.data(), rounded.data(), rounded.size() * sizeof(T));
  }
  return buffer.data();
}

template <class T>
Wide<T>* DeviceWeights<T>::place_gradient(const float* host, std::int64_t count) {
  if (!host) return nullptr;
  Buffer<Wide<T>>& buffer = gradients_[host];
  if (buffer.size() == 0) buffer = Buffer<Wide<T>>(static_cast<std::size_t>(count), memory_);
  return buffer.data();
}

template <class T>
NormWeights<T> DeviceWeights<T>::place(const NormWeights<float>& norm, std::int64_t width) {
  return {place(norm.weight, width), place(norm.bias, width), place_gradient(norm.dweight, width),
          place_gradient(norm.dbias, width)};
}

template <class T>
LinearWeights<T> DeviceWeights<T>::place(const LinearWeights<float>& linear) {
  LinearWeights<T> placed;
  placed.weight = place(linear.weight, linear.N * linear.K);
  placed.bias = place(linear.bias, linear.N);
  placed.dweight = place_gradient(linear.dweight, linear.N * linear.K);
  placed.dbias = place_gradient(linear.dbias, linear.N);
  placed.N = linear.N;
  placed.K = linear.K;
  for (const LoraWeights<float>& lora : linear.adapters) {
    LoraWeights<T> adapter;
    adapter.a = place(lora.a, lora.rank * linear.K);
    adapter.b = place(lora.b, lora.num_rows * lora.rank);
    adapter.da = place_gradient(lora.da, lora.rank * linear.K);
    adapter.db = place_gradient(lora.db, lora.num_rows * lora.rank);
    adapter.first_row = lora.first_row;
    adapter.num_rows = lora.num_rows;
    adapter.rank = lora.rank;
    adapter.scale = lora.scale;
    placed.adapters.push_back(adapter);
  }
  return placed;
}

template <class T>
const Wide<T>* DeviceWeights<T>::gradient_of(const float* host) const {
  const auto found = gradients_.find(host);
  return found == gradients_.end() ? nullptr : found->second.data();
}

template <class T>
std::size_t DeviceWeights<T>::bytes() const {
  std::size_t total = 0;
  for (const auto& [host, buffer] : values_) total += buffer.bytes();
  for (const auto& [host, buffer] : gradients_) total += buffer.bytes();
  return total;
}

template class DeviceWeights<float>;
template class DeviceWeights<Bfloat16>;

}  // namespace rlhf

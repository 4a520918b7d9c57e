#pragma once
// The weights of one decoder as the forward and backward programs see them: pointers into flat parameter
// buffers.

#include <cstdint>
#include <vector>

#include "rlhf/kernels/bfloat16.h"
#include "rlhf/model/model_config.h"

namespace rlhf {

class GradientSink;
class LayerStream;
class PackedMatrix;
class ResidentWeights;

/// A low-rank adapter (Hu et al. 2021, LoRA) on a range of output rows: y[rows] += scale * B (A x).
template <class T>
struct LoraWeights {
  const T* a = nullptr;  ///< [rank, K]
  const T* b = nullptr;  ///< [num_rows, rank]
  Wide<T>* da = nullptr;
  Wide<T>* db = nullptr;
  std::int64_t first_row = 0, num_rows = 0, rank = 0;
  double scale = 1;
};

/// y = W x + bias, with W [N, K] row-major. Gradient pointers are null where the weights are frozen.
template <class T>
struct LinearWeights {
  const T* weight = nullptr;
  const T* bias = nullptr;
  Wide<T>* dweight = nullptr;
  Wide<T>* dbias = nullptr;
  std::int64_t N = 0, K = 0;
  std::vector<LoraWeights<T>> adapters;
  const PackedMatrix* packed = nullptr;  ///< read in place of `weight` by forward passes; see RolloutWeights

  bool trainable() const { return dweight || dbias || !adapters.empty(); }
};

template <class T>
struct NormWeights {
  const T* weight = nullptr;  ///< [D]; null = this norm does not exist
  const T* bias = nullptr;
  Wide<T>* dweight = nullptr;
  Wide<T>* dbias = nullptr;
};

template <class T>
struct LayerWeights {
  NormWeights<T> attention_norm, post_attention_norm, mlp_norm, post_mlp_norm, q_norm, k_norm;
  LinearWeights<T> qkv;      ///< [(N + 2 G) H, D]: q, k and v rows are adjacent in the flat buffer
  LinearWeights<T> out;      ///< [D, N H]
  LinearWeights<T> gate_up;  ///< gated: [2 F, D], gate then up; plain: [F, D]
  LinearWeights<T> down;     ///< [D, F]
};

template <class T>
struct DecoderWeights {
  ModelConfig config;
  const T* embedding = nullptr;  ///< [V, D]
  Wide<T>* dembedding = nullptr;
  const T* positions = nullptr;  ///< [max_positions, D], learned positions only
  Wide<T>* dpositions = nullptr;
  std::vector<LayerWeights<T>> layers;
  NormWeights<T> final_norm;
  LinearWeights<T> head;  ///< language-model head [V, D] (the embedding when tied) or scalar head [1, D]
  std::int64_t first_trainable_layer = 0;  ///< layers before it need no backward; num_layers when none does
  bool embedding_trainable = false;
  /// The same weights on a device: what passes read that run there. Null = none are there.
  ResidentWeights* resident = nullptr;
  /// On a device: brings layers that stay on the host, before each is used. Null = all are there.
  LayerStream* stream = nullptr;
  /// Told by backward passes what they have completed of the gradient. Null = it stays where they add it.
  GradientSink* gradient_sink = nullptr;
};

}  // namespace rlhf

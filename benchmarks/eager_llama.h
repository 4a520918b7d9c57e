#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "rlhf/model/model_config.h"

namespace rlhf::eager {

/// A llama-style decoder written with LibTorch's own operators, one call an operation, as eager PyTorch runs
/// it: the peer that the speed of this library is compared with, and an oracle for its numbers.
///
/// Shape legend: B sequences, S tokens of one, D width, N heads, G kv heads, H head width, V vocabulary.
class Llama {
 public:
  /// All weights normal(0, 0.02), norms 1. @throws InvalidArgument for anything but a plain llama.
  Llama(const ModelConfig& config, at::ScalarType type);

  /// K and V of the tokens so far, per layer [B, G, capacity, H].
  struct Cache {
    std::vector<at::Tensor> k, v;
    std::int64_t length = 0;
  };
  Cache make_cache(std::int64_t batch, std::int64_t capacity) const;

  /// Hidden states [B, S, D] after the final norm for ids [B, S] (int64). With a cache the tokens come after
  /// those in it, and S must be 1 unless it is empty.
  at::Tensor forward(const at::Tensor& ids_BS, Cache* cache) const;
  /// Logits [..., V] of hidden states [..., D].
  at::Tensor logits(const at::Tensor& hidden) const;

  /// Every weight under its Hugging Face name.
  const std::vector<std::pair<std::string, at::Tensor>>& parameters() const { return parameters_; }

 private:
  struct Layer {
    at::Tensor input_norm, q, k, v, out, mlp_norm, gate, up, down;
  };
  at::Tensor make(const std::string& name, std::vector<std::int64_t> shape);
  at::Tensor attention(const Layer& layer, std::size_t index, const at::Tensor& x_BSD, Cache* cache) const;
  at::Tensor rotate(const at::Tensor& x_BSNH, std::int64_t first_position) const;

  ModelConfig config_;
  at::ScalarType type_;
  std::vector<std::pair<std::string, at::Tensor>> parameters_;
  at::Tensor embedding_, head_, final_norm_, cos_, sin_;  // cos_, sin_: [positions, H]
  std::vector<Layer> layers_;
};

}  // namespace rlhf::eager

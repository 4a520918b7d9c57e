#pragma once

#include <functional>
#include <vector>

#include "rollout/engine/step_program.h"
#include "rollout/engine/trunk_store.h"

namespace rlhf {

/// An engine's steps on the CPU, in float.
class HostStep : public StepProgram {
 public:
  HostStep(const ModelConfig& config, const Compute<float>& compute, const Arena& arena,
           std::int64_t trunk_layers);

  DeviceMemory* queue() const override { return nullptr; }
  void copy_blocks(const std::vector<BlockCache::Move>& moves) override;
  void step(const DecoderWeights<float>& weights, const Rows& rows, std::span<const Draw> draws,
            std::span<DrawnToken> drawn) override;
  std::vector<float> kept_states(std::span<const std::int32_t> table, std::int64_t length) const override;
  std::string first_not_finite(const DecoderWeights<float>& weights, const Rows& row) override;
  double matmul_flops() const override { return runner_.matmul_flops(); }
  std::size_t workspace_bytes() const override {
    return runner_.scratch_bytes() + x_.bytes() + hidden_.bytes() + logits_.bytes();
  }

 private:
  void run(const DecoderWeights<float>& weights, const Rows& rows);
  void draw(const DecoderWeights<float>& weights, std::span<const Draw> draws, std::span<DrawnToken> drawn);

  ModelConfig config_;
  std::int64_t trunk_layers_;
  DecoderRunner<float> runner_;
  KvStore<float> store_;
  TrunkStore trunk_;
  Buffer<float> x_, hidden_, logits_;
};

/// "layer 3 of 30" and the like: the first of a row's states that is not finite.
/// @param is_finite (layers) -> whether the states behind so many layers are finite, asked in order
std::string name_first_not_finite(std::int64_t num_layers,
                                  const std::function<bool(std::int64_t)>& is_finite);

}  // namespace rlhf

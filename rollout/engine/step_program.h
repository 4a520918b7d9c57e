#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "rlhf/model/decoder.h"
#include "rlhf/tensor/arena.h"
#include "rollout/cache/block_cache.h"
#include "rollout/engine/draw_token.h"

namespace rlhf {

/// What an engine computes: the layers of a step's rows over the K/V in an arena's slabs, and the draws from
/// the last hidden states. One on the CPU, one on an accelerator. Weights are the host's; on an accelerator
/// their resident copies are read.
class StepProgram {
 public:
  virtual ~StepProgram() = default;

  /// The queue it works in; null on the CPU, which has none.
  virtual DeviceMemory* queue() const = 0;
  /// Renames blocks: copies what they hold.
  virtual void copy_blocks(const std::vector<BlockCache::Move>& moves) = 0;
  /// One of a step's rows, and what its draw depends on.
  struct Draw {
    std::int64_t row = 0;
    DrawContext context;
  };
  /// Runs all layers on the rows and draws a token for each of `draws`, in ascending order of rows.
  virtual void step(const DecoderWeights<float>& weights, const Rows& rows, std::span<const Draw> draws,
                    std::span<DrawnToken> drawn) = 0;
  /// States behind the first layers of a sequence's first `length` tokens; empty when none are kept.
  virtual std::vector<float> kept_states(std::span<const std::int32_t> table, std::int64_t length) const = 0;
  /// Runs one row again and says behind what its states are no longer finite, such as "layer 3 of 30".
  virtual std::string first_not_finite(const DecoderWeights<float>& weights, const Rows& row) = 0;

  virtual double matmul_flops() const = 0;
  /// Bytes held beside the K/V: what the largest step so far has needed.
  virtual std::size_t workspace_bytes() const = 0;
};

/// Rows whose logits exist at once. On the CPU 64 rows of a 49152-word vocabulary are 12 MiB; the head's
/// weights (113 MB there) are read once for all of them. An accelerator takes any usual batch at once.
inline constexpr std::int64_t kHostLogitsRows = 64, kDeviceLogitsRows = 256;

/// Bytes of one activation where a Compute's models run.
std::size_t activation_bytes_of(const Compute<float>& compute);
/// Bytes of K, V and kept states that one block takes there.
std::size_t slab_bytes_of(const ModelConfig& config, const Compute<float>& compute, std::int64_t trunk_layers,
                          KvFormat kv);

/// @param arena with slabs of slab_bytes_of; must outlive the program
/// @param trunk_layers states behind so many layers are kept; 0 = none. On the CPU only.
/// @param kv others than kAuto on an accelerator only
std::unique_ptr<StepProgram> make_step_program(const ModelConfig& config, const Compute<float>& compute,
                                               const Arena& arena, std::int64_t trunk_layers, KvFormat kv);

}  // namespace rlhf

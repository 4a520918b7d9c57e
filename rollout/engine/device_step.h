#pragma once

#include <map>
#include <vector>

#include "rlhf/kernels/accelerator.h"
#include "rlhf/tensor/staging.h"
#include "rollout/engine/step_edits.h"
#include "rollout/engine/step_program.h"

namespace rlhf {

/// An engine's steps on an accelerator. Rows are edited (penalties, biases, constraints), filtered and drawn
/// there, from the same uniform numbers as on the CPU: only the token and its statistics come back. The
/// logits of rows with lists of alternatives come to the host and are drawn there, by draw_token.
///
/// A step that only decodes is recorded (on CUDA: captured as a graph) and replayed by later steps of the
/// same size: the number of rows is rounded up, by rows that repeat the last one, and so is the number of
/// keys that the longest row sees.
class DeviceStep : public StepProgram {
 public:
  DeviceStep(const ModelConfig& config, const Compute<float>& compute, const Arena& arena, KvFormat kv);

  DeviceMemory* queue() const override { return ops_.memory(); }
  void copy_blocks(const std::vector<BlockCache::Move>& moves) override;
  void step(const DecoderWeights<float>& weights, const Rows& rows, std::span<const Draw> draws,
            std::span<DrawnToken> drawn) override;
  std::vector<float> kept_states(std::span<const std::int32_t>, std::int64_t) const override { return {}; }
  std::string first_not_finite(const DecoderWeights<float>& weights, const Rows& row) override;
  double matmul_flops() const override { return runner_.matmul_flops(); }
  std::size_t workspace_bytes() const override;

 private:
  using T = Bfloat16;
  /// Where the chunk's results lie on the device, one behind the other; or on the host.
  struct Results {
    kernels::LogitsRow* statistics;
    double* unfiltered_lse;     ///< written where a filter removes something
    double* unedited_logprobs;  ///< written where a row is edited
    TokenId* tokens;
  };
  /// What a recorded step was made for, and with.
  struct StepKey {
    std::int64_t rows = 0, max_keys = 0;
    bool filters = false, edits = false;
    std::vector<const void*> addresses;
    auto operator<=>(const StepKey&) const = default;
  };
  struct RecordedStep {
    std::int64_t runs = 0;  ///< before it is recorded: the first makes buffers and plans of products
    std::unique_ptr<DeviceMemory::Recording> recording;
  };

  bool only_decodes(const Rows& rows, std::span<const Draw> draws) const;
  void decode(const DecoderWeights<T>& weights, const Rows& rows, std::span<const Draw> draws,
              std::span<DrawnToken> drawn);
  void run(const DecoderWeights<T>& weights, const Rows& rows);
  void stage_draws(std::span<const Draw> draws, std::int64_t padded);
  void reserve(std::int64_t draws);
  void queue_draws(const DecoderWeights<T>& weights, std::int64_t count);
  static Results results(std::byte* memory, std::int64_t count);
  void read_back(std::span<const Draw> draws, std::int64_t count, std::span<DrawnToken> drawn);
  void draw_others_on_host(std::span<const Draw> draws, std::span<DrawnToken> drawn);

  ModelConfig config_;
  Compute<float> compute_;
  DeviceOps<T> ops_;
  DecoderRunner<T> runner_;
  KvStore<T> store_;
  Staging staging_;
  Staging::Place<std::int64_t> staged_rows_;
  Staging::Place<kernels::DrawKey> keys_;
  Staging::Place<kernels::RowFilter> filters_;
  bool has_filters_ = false;  ///< any of the staged draws
  StepEdits edits_;           ///< of the staged draws
  Buffer<T> x_, hidden_;
  Buffer<float> logits_;
  Buffer<double> workspace_;
  Buffer<std::byte> results_;
  std::vector<std::byte> host_results_;
  std::vector<float> host_logits_;
  Rows padded_;
  std::map<StepKey, RecordedStep> recorded_;
};

/// Bytes that come back for every draw.
inline constexpr std::size_t kDrawResultBytes =
    sizeof(kernels::LogitsRow) + 2 * sizeof(double) + sizeof(TokenId);
/// Rows, and keys of the longest row, of the recorded step that decodes `rows` rows with up to `keys` keys.
std::int64_t padded_decode_rows(std::int64_t rows);
std::int64_t padded_decode_keys(std::int64_t keys);

}  // namespace rlhf

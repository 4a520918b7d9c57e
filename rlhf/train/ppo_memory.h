#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "rlhf/memory/arbiter.h"
#include "rlhf/memory/bytes_predictor.h"
#include "rlhf/model/sequence_pass.h"
#include "rlhf/report/metrics_writer.h"
#include "rlhf/train/step_gate.h"
#include "rollout/engine/rollout_engine.h"

namespace rlhf {

/// The memory budget of a PPO stage: the generator's K/V cache and the trainer's passes share what models and
/// optimizers leave. docs/design/memory.md has the lock order, and why nothing waits for ever.
///
/// The cache gives blocks back between two decode steps when a pass needs them, and takes them again when the
/// train lane is idle. Samples and gradients do not depend on any of it.
class PpoMemory {
 public:
  struct Setting {
    std::uint64_t budget_bytes = MemoryArbiter::kUnlimited;
    std::vector<std::pair<std::string, std::uint64_t>> fixed;  ///< tenants that hold what they hold
    std::int64_t least_blocks = 0;                             ///< that the cache always keeps

    /// What the fixed tenants leave of the budget, at most `address_space`: the arena of engine and pass.
    std::uint64_t arena_bytes(std::uint64_t address_space) const;
  };
  /// The engine and the pass have their memory from `arena`; all three must outlive it, and nothing may use
  /// them afterwards. @throws MemoryError with who holds what.
  PpoMemory(const Setting& setting, const ModelConfig& model, RolloutEngine& engine,
            SequencePass<float>& pass, Arena& arena);
  ~PpoMemory() { arena_.set_make_room({}); }

  // ---- generate lane ----

  /// The right to use the engine, one step at a time; see StepGate.
  std::unique_lock<std::mutex> step() { return gate_.step(); }
  /// Gives the cache what it lacks and can have. During a step's turn.
  void grow_cache();

  // ---- train lane ----

  /// The memory of one pass; what it took is measured when it ends.
  class Pass {
   public:
    Pass(Pass&&) = delete;
    ~Pass();

   private:
    friend class PpoMemory;
    Pass(PpoMemory& memory, const PassShape& shape, std::int64_t kept_layers);
    PpoMemory& memory_;
    std::unique_lock<std::mutex> lock_;
  };
  /// Waits until the bytes of a pass are there, a decode step at most.
  /// @param kept_layers whose activations are kept for backward; 0 = the pass only scores
  /// @throws MemoryError when they do not fit beside what cannot be given back.
  Pass begin_pass(const PassShape& shape, std::int64_t kept_layers);
  /// Calls `fn` while no decode step runs.
  template <class Fn>
  void between_steps(const Fn& fn) {
    gate_.between_steps(fn);
  }
  /// While it is true, the cache does not grow. Called at every begin and end of a task, from either lane.
  void set_training(bool training) { training_ = training; }
  /// Counters since the last call; names in docs/reference/metrics.md.
  Metrics take_metrics();

  MemoryUsage usage() const { return arbiter_.usage(); }

 private:
  /// The largest of some passes, kind by kind.
  struct Extent {
    PassShape shape;
    std::int64_t kept_layers = 0;

    void include(const PassShape& other, std::int64_t layers);
    bool operator==(const Extent&) const = default;
  };
  bool shrink_cache(std::uint64_t wanted_bytes);
  void release_idle_pass();
  void acquire_pass(const PassShape& shape, std::int64_t kept_layers);
  void measure_pass();
  void drop_buffers();
  BytesPredictor& predictor(const Extent& extent) {
    return extent.kept_layers > 0 ? training_passes_ : scoring_;
  }
  std::uint64_t formula(const Extent& extent) const;

  ModelConfig model_;
  RolloutEngine& engine_;
  SequencePass<float>& pass_;
  Arena& arena_;
  std::int64_t least_blocks_;
  MemoryArbiter arbiter_;
  TenantId cache_tenant_ = 0, pass_tenant_ = 0;
  std::vector<MemoryLease> fixed_;
  std::atomic<bool> training_{false};

  std::mutex pass_mutex_;  ///< held during a pass; guards pass_ and what follows
  MemoryLease pass_lease_;
  Extent leased_;                             ///< passes since the lease was empty
  Extent made_;                               ///< passes since the buffers were made anew
  BytesPredictor scoring_, training_passes_;  ///< of buffers without and with activations that are kept
  double error_sum_ = 0;
  std::int64_t num_passes_ = 0, num_overruns_ = 0;

  StepGate gate_;  ///< guards engine_ and what follows
  MemoryLease cache_lease_;

  MemoryUsage reported_;  ///< counters at the last take_metrics; train lane
};

}  // namespace rlhf

#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "rlhf/model/model_config.h"
#include "rlhf/model/sequence_pass.h"
#include "rlhf/train/run_options.h"

namespace rlhf {

/// The parts of an iteration, in the order of serial mode.
enum class Phase { kGenerate, kScore, kTrain, kOptimize };
inline constexpr std::array<Phase, 4> kAllPhases = {Phase::kGenerate, Phase::kScore, Phase::kTrain,
                                                    Phase::kOptimize};
/// Returns "generate", "score", "train" or "optimize".
const char* to_string(Phase phase);

/// Bytes of one number, by use.
struct NumberSizes {
  std::uint64_t weight = 4, gradient = 4;
  std::uint64_t optimizer = 8;  ///< two moments, and master weights where `weight` is less than fp32
  std::uint64_t kv = 4, activation = 4;

  /// This program on a CPU.
  static NumberSizes fp32() { return {}; }
  /// bf16 weights, cache and activations; fp32 gradient, master weights and moments.
  static NumberSizes bf16() { return {2, 4, 12, 2, 2}; }
};

/// Names of the tenants that move during an iteration.
inline constexpr const char* kKvCacheTenant = "K/V cache";
inline constexpr const char* kActivationsTenant = "activations";

/// What surrounds the options in a plan.
struct PlanSetting {
  ModelConfig model;
  std::int64_t longest_prompt = 1;
  std::uint64_t machine_bytes = 0;  ///< that percentages in the options refer to
  NumberSizes sizes = NumberSizes::fp32();
  std::int64_t devices = 1;
  Sharding sharding = Sharding::kNone;
  std::optional<ModelConfig> teacher;  ///< of distillation
};

/// What one tenant of the budget needs, phase by phase.
struct PlannedTenant {
  struct Need {
    std::uint64_t minimum = 0;  ///< without it the phase cannot run
    std::uint64_t wanted = 0;   ///< at least minimum; what lies between can be given back
    std::uint64_t reclaimable() const { return wanted - minimum; }
  };
  std::string name;
  std::array<Need, kAllPhases.size()> needs{};
  const Need& need(Phase phase) const { return needs[static_cast<std::size_t>(phase)]; }
  /// Largest of the wanted bytes.
  std::uint64_t peak_bytes() const;
};

/// Who holds how many bytes of one device over an iteration.
struct MemoryPlan {
  std::vector<PlannedTenant> tenants;
  std::vector<MemoryPlan> other_stages;  ///< of a run with ppo: what the others need, together; none or one

  /// The least budget under which the run works, and the least under which nothing is ever given back.
  std::uint64_t minimum_bytes() const;
  std::uint64_t wanted_bytes() const;
  bool fits(std::uint64_t budget_bytes) const { return minimum_bytes() <= budget_bytes; }
  /// What each tenant holds in a phase: its minimum, then what the budget leaves, in the tenants' order.
  std::vector<std::uint64_t> held(Phase phase, std::uint64_t budget_bytes) const;
  /// "\n  12 MiB  policy weights ..." of the phase that needs most.
  std::string list_of_needs() const;
};

/// What passes do under a choice that is made; kAuto = none.
Recompute recompute_of(RecomputeChoice choice);
/// Makes the choice of `memory.recompute: auto`: layers only where the run does not fit the budget otherwise.
RunOptions with_recompute_chosen(RunOptions options, const PlanSetting& setting, std::uint64_t budget_bytes);

/// Plans the memory of a run: a function of its options, no model and no data needed. For a run with the
/// stage ppo the phases are those of its iterations; other stages have the same tenants as far as they use
/// them, with the largest pass of any.
/// @throws InvalidArgument when the options do not fit the model (LoRA targets, last_layers).
MemoryPlan plan_memory(const RunOptions& options, const PlanSetting& setting);

/// Bytes that an engine needs beside its cache, at most.
/// @param number_bytes of an activation: below 4 it runs on an accelerator
/// @param longest_prompt in tokens
std::uint64_t generator_workspace_bytes(const ModelConfig& model, const RolloutOptions& rollout,
                                        std::uint64_t number_bytes, std::int64_t longest_prompt);

/// Bytes of a teacher's scoring pass, at most.
std::uint64_t teacher_pass_bytes(const ModelConfig& teacher, const RolloutOptions& rollout,
                                 const PpoStageOptions& options, std::int64_t longest_prompt);

/// What decides how much of frozen layers' results is kept.
struct TrunkResults {
  const ModelConfig& model;
  const RolloutOptions& rollout;
  const PpoStageOptions& options;
  const ScheduleOptions& schedule;
  std::uint64_t number_bytes = sizeof(float);
};
/// Bytes of frozen layers' results that are kept at most: of every batch that is in flight.
std::uint64_t trunk_result_bytes(const TrunkResults& results, std::int64_t longest_prompt,
                                 std::uint64_t machine_bytes);

/// K/V blocks that a budget leaves the run's generator while nothing is trained; 0 = nothing is generated.
std::int64_t blocks_under(const RunOptions& options, const PlanSetting& setting, std::uint64_t budget_bytes);

/// Configuration of the run's teacher; none without distillation. @throws IoError
std::optional<ModelConfig> teacher_config(const RunOptions& options);

/// Whether PPO has a reference model beside the policy: for a KL in reward or loss, or for that of the
/// report.
bool needs_ppo_reference(const RunOptions& options);

/// "12 KiB", "12 MiB" from 10 MiB on, "12.3 GiB" from 10 GiB on.
std::string memory_text(std::uint64_t bytes);

}  // namespace rlhf

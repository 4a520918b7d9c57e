#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "rlhf/train/memory_plan.h"

namespace rlhf {

/// Changes under which a run fits its budget. Each was planned before it is given.
struct Advice {
  std::vector<std::pair<std::string, std::string>> changes;  ///< key (or --flag of `rlhf plan`) and value
  std::uint64_t minimum_bytes = 0;                           ///< of a device after them
};

/// Ways to make a run fit, the least intrusive first; empty when none is found. Micro-batches, frozen layers'
/// results, trained layers, adapters, and, on several devices, sharding and more devices are tried.
std::vector<Advice> advise(const RunOptions& options, const PlanSetting& setting, std::uint64_t budget_bytes);
/// "key: value, key: value", as it would stand in a run file.
std::string to_string(const Advice& advice);

/// How far a batch can grow under a budget, all else unchanged.
struct BatchLimits {
  /// Largest ppo.max_tokens_per_micro_batch that fits beside the least K/V cache; none = not even the longest
  /// sequence.
  std::optional<std::int64_t> micro_batch_tokens;
  /// Largest rollout.max_sequences whose samples all stay in the cache; 0 = not one.
  std::int64_t max_sequences = 0;
  std::uint64_t token_bytes = 0;     ///< of one token of a micro-batch
  std::uint64_t sequence_bytes = 0;  ///< of one sample of the longest prompt and response in the cache
};
BatchLimits batch_limits(const RunOptions& options, const PlanSetting& setting, std::uint64_t budget_bytes);

/// @throws MemoryError with the list of needs and the advice when a run does not fit. `key` is what sets the
/// budget: "memory.budget".
void require_fit(const RunOptions& options, const PlanSetting& setting, std::uint64_t budget_bytes,
                 const std::string& key);

}  // namespace rlhf

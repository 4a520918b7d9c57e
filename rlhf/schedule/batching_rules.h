#pragma once

#include <algorithm>
#include <cstddef>

/// Rules of the workload that the program and the simulator have in common.
namespace rlhf::schedule {

/// Decode steps of one generate call at most: long enough to be cheap, short enough that new weights and new
/// prompts do not wait.
inline constexpr int kMostDecodeSteps = 8;

/// Responses that stay together when a batch is divided into mini-batches. Whole groups while there are
/// enough: then a prompt is computed once an epoch, and the advantages of a group cancel within a step.
inline std::size_t mini_batch_unit(std::size_t prompts, std::size_t samples_per_prompt,
                                   std::size_t mini_batches) {
  return mini_batches <= prompts ? samples_per_prompt : 1;
}

/// Full micro-batches that are held back while sequences still arrive, so that sequences with common heads
/// meet: fewer when little is still to come, none at the end. `num_seen_tokens`: of all that have come.
inline std::size_t num_kept_micro_batches(std::size_t num_missing, std::size_t num_seen,
                                          std::size_t num_seen_tokens, std::size_t max_rows) {
  constexpr std::size_t kMostKept = 4;
  if (num_missing == 0) return 0;
  const std::size_t expected_tokens = num_missing * num_seen_tokens / num_seen;
  return std::min(kMostKept, 1 + expected_tokens / max_rows);
}

}  // namespace rlhf::schedule

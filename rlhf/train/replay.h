#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "rlhf/core/log.h"
#include "rlhf/train/stage.h"

namespace rlhf {

/// One thing that a run recorded and a replay found.
struct ReplayCheck {
  std::string name;      ///< "samples", "policy", "critic" or a metric
  std::string recorded;  ///< a hash or a number, as text that tells every bit; "none" where there is none
  std::string replayed;
  bool same() const { return recorded == replayed; }
};

struct Replay {
  std::int64_t first = 0;            ///< iteration that was executed first, from 1
  std::vector<ReplayCheck> hashes;   ///< of the step's samples, and of the weights after it
  std::vector<ReplayCheck> metrics;  ///< losses, rewards and all else that is not time or memory
  /// Steps before it that were executed on the way and differ already: the first is where to look.
  std::vector<std::int64_t> different_before;

  bool same() const;
};

/// Executes the PPO iteration `step` (from 1) of a run again, from the latest state that the run has kept
/// before it (run.keep_checkpoints, an unfinished run's checkpoint, or the start of the stage), and compares
/// what comes out with metrics.jsonl and hashes.jsonl, bit for bit. The run directory is only read.
/// @throws ConfigError for a run without the stage ppo, a step it does not have, or mode async, whose samples
/// depend on timing; IoError for a record that is missing.
Replay replay_step(const std::filesystem::path& run_dir, std::int64_t step, const LogSink& log);

}  // namespace rlhf

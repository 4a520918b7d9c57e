#pragma once

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "rlhf/core/log.h"
#include "rlhf/distributed/collective.h"
#include "rlhf/kernels/ops.h"
#include "rlhf/memory/arbiter.h"
#include "rlhf/model/sequence_pass.h"
#include "rlhf/report/metrics_writer.h"
#include "rlhf/schedule/trace.h"
#include "rlhf/train/optimizer.h"

namespace rlhf {

/// Value of a metric; `otherwise` when it is not there.
double metric(const Metrics& metrics, const std::string& name, double otherwise);

/// Receives what a run does. All calls but lane_event come from the thread that runs the pipeline. Embedders
/// derive from it.
class RunObserver {
 public:
  virtual ~RunObserver() = default;
  virtual void message(LogLevel, const std::string&) {}
  virtual void stage_begin(const std::string& /*stage*/, std::int64_t /*steps*/) {}
  /// After every optimizer step (sft, reward) or iteration (ppo). `step` counts from 1.
  virtual void step(const std::string& /*stage*/, std::int64_t /*step*/, std::int64_t /*steps*/,
                    const Metrics&) {}
  /// One judged response, as one JSON object.
  virtual void sample(const std::string& /*stage*/, const std::string& /*json*/) {}
  /// What a step's result was made of, as hashes: name and 16 hexadecimal digits. After `step`, and only when
  /// asked for.
  virtual void record(const std::string& /*stage*/, std::int64_t /*step*/, const Hashes&) {}
  virtual bool wants_records() const { return false; }
  /// What the scheduler's lanes did or waited for. Called from both lanes, one call at a time.
  virtual void lane_event(const schedule::TraceEvent&) {}
};

/// What every stage gets.
struct StageContext {
  explicit StageContext(Compute<float> lane) : compute(lane) {}

  Compute<float> compute;
  RunObserver* observer = nullptr;
  Collective* collective = &one_process();  ///< of the ranks that run the stage together; never null
  const std::atomic<bool>* stop = nullptr;  ///< set by Ctrl-C: the stage ends after the current step
  std::uint64_t seed = 0;
  /// Folder for the state of unfinished stages; empty = none. Rank 0 alone reads and writes there.
  std::filesystem::path checkpoints;
  bool resume = false;                ///< go on from the state found there; otherwise it is not looked at
  std::int64_t checkpoint_every = 0;  ///< steps between checkpoints; 0 = only when stopped
  bool keep_checkpoints = false;      ///< all of them, not only the last two
  /// Above 0: the stage starts before this step, ends after it and writes nothing.
  std::int64_t replay_step = 0;
  std::string fingerprint;  ///< of the configuration; a checkpoint of another one is refused
  /// Bytes that weights, optimizer states, caches and buffers may take together.
  std::uint64_t memory_budget = MemoryArbiter::kUnlimited;
  Recompute recompute = Recompute::kNone;  ///< of training passes
  MomentPlacement moments;                 ///< of optimizers
  /// K/V blocks that a generator gets at most: what the budget leaves it.
  std::int64_t max_blocks = std::numeric_limits<std::int64_t>::max();

  /// On any rank; every rank asks.
  bool stop_requested() const { return any_rank(*collective, stop && stop->load(std::memory_order_relaxed)); }
};

/// Thrown when a stage ended early because stop was requested; its state is in the checkpoint.
class StageStopped : public std::exception {
 public:
  const char* what() const noexcept override { return "stopped on request; continue with --resume"; }
};

/// Wall time since construction or the last lap.
class Stopwatch {
 public:
  Stopwatch();
  double seconds() const;
  /// Seconds since the last lap.
  double lap();

 private:
  double start_, lap_;
};

/// Physical memory of this machine, in bytes.
std::uint64_t machine_memory_bytes();
/// Memory of the device that a Compute's models run on, in bytes.
std::uint64_t device_memory_bytes(const Compute<float>& compute);
/// Largest resident set of this process so far, in bytes.
std::size_t peak_resident_bytes();
/// Resident set of this process now, in bytes.
std::size_t resident_bytes();

}  // namespace rlhf

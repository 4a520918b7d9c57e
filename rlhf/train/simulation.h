#pragma once

#include <filesystem>

#include "rlhf/schedule/simulator.h"
#include "rlhf/train/run_options.h"

namespace rlhf {

/// What the simulator needs to know of a run.
schedule::SimulatedRun simulated_run(const RunOptions& options);

/// The log-normal lengths that have this mean and standard deviation after they are rounded and clipped at
/// `max_tokens`. Prompt tokens are left at their default.
schedule::LengthModel fit_lengths(double mean, double stddev, std::int64_t max_tokens);

/// Costs of this machine from a finished run of the stage ppo in mode serial: medians over its iterations of
/// the time metrics, divided by the work that was done in them, and medians of the spans of trace.json. A run
/// does not tell apart what depends on the number of calls, so that those costs are 0; sharing stays at its
/// default. @throws IoError naming the file and what is missing; ConfigError.
schedule::CostModel calibrate(const std::filesystem::path& run_dir);

/// Speed of a lane on its share of the cores: the same run with all threads and with half of them.
/// @throws as calibrate.
schedule::SharingModel calibrate_sharing(const std::filesystem::path& all_threads,
                                         const std::filesystem::path& half_threads);

}  // namespace rlhf

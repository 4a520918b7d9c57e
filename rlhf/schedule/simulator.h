#pragma once

#include <array>
#include <string_view>
#include <vector>

#include "rlhf/schedule/policy.h"
#include "rlhf/schedule/simulated_workload.h"

namespace rlhf::schedule {

/// Why a lane does not compute.
enum class Wait {
  kSamples,      ///< train: no sample to score or train
  kWeights,      ///< generate: the policy wants newer weights first
  kSlowestRank,  ///< train: another device has not reached the optimizer step
  kAllReduce,    ///< train: gradients are on their way
  kReward,       ///< train: reward servers have not answered
};
inline constexpr std::array<Wait, 5> kAllWaits = {Wait::kSamples, Wait::kWeights, Wait::kSlowestRank,
                                                  Wait::kAllReduce, Wait::kReward};
/// Returns "samples", "weights", "slowest_rank", "all_reduce" or "reward".
const char* to_string(Wait wait);
inline Lane lane_of(Wait wait) {
  return wait == Wait::kWeights ? Lane::kGenerate : Lane::kTrain;
}

/// What a simulated run did. Seconds are simulated; those of lanes and waits are summed over the devices.
struct Simulation {
  std::size_t devices = 1;
  std::vector<double> iteration_s;  ///< from the end of an iteration on the slowest device to the next
  double wall_s = 0;
  std::size_t trained_samples = 0;
  std::int64_t trained_tokens = 0;                ///< of responses
  std::vector<std::int64_t> tokens_by_staleness;  ///< [versions behind]
  std::array<double, kAllLanes.size()> busy_s{};
  std::array<double, kAllTasks.size()> task_s{};  ///< busy_s by task
  std::array<double, kAllWaits.size()> wait_s{};
  double idle_s = 0;  ///< neither lane of a device computed

  double device_s() const { return wall_s * static_cast<double>(devices); }
  double utilisation(Lane lane) const { return busy_s[static_cast<std::size_t>(lane)] / device_s(); }
  double waiting(Wait wait) const { return wait_s[static_cast<std::size_t>(wait)] / device_s(); }
  /// Seconds of a task in an iteration of one device.
  double iteration_seconds(Task task) const {
    return task_s[static_cast<std::size_t>(task)] / static_cast<double>(devices * iteration_s.size());
  }
  double samples_per_s() const { return static_cast<double>(trained_samples) / wall_s; }
  double tokens_per_s() const { return static_cast<double>(trained_tokens) / wall_s; }
  double mean_staleness() const;
};

/// Runs the policy's own decisions on a fake clock, data parallel: every device has a Progress and both lanes
/// of its own and a share of the prompts; optimizer steps begin when all have reached them. Deterministic.
/// @throws InvalidArgument when there are fewer prompts than devices; InternalError when a policy breaks the
/// task graph, leaves both lanes waiting, or uses samples that are staler than it says.
Simulation simulate(const Policy& policy, const SimulatedRun& run, const CostModel& costs,
                    std::size_t devices);

/// The value below which a share of the values lies, between the two nearest. `values` not empty.
double quantile(std::vector<double> values, double share);

/// The first of the simulations, given from least to most stale, that comes within `tolerance` of the most
/// samples a second: staleness is only worth its price when it buys time. @return its index
std::size_t recommend(const std::vector<Simulation>& by_staleness, double tolerance = 0.05);

}  // namespace rlhf::schedule

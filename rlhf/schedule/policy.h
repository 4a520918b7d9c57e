#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>

#include "rlhf/schedule/progress.h"

namespace rlhf::schedule {

/// Decides what runs when. Stateless: the next action of a lane is a function of the progress, so that the
/// executor, the simulator and the tests run the very same decisions.
class Policy {
 public:
  virtual ~Policy() = default;
  virtual std::string_view name() const = 0;
  /// What an idle lane does now; nothing = it waits until the other lane has done something. An action must
  /// be one that Progress::check allows.
  virtual std::optional<Action> next(Lane lane, const Progress& progress) const = 0;
  /// True when both lanes can be busy at once. Otherwise one thread runs everything.
  virtual bool overlaps() const = 0;
  /// Versions that the weights of a sampled token may lie behind those that are trained on it. 0 = on-policy:
  /// generation may read the trained weights themselves.
  virtual std::int64_t max_staleness() const = 0;
  /// True when weights may be published while samples are being decoded; then a sample has tokens of several
  /// versions. Otherwise all tokens of an iteration come from one version.
  virtual bool updates_in_flight() const = 0;
};

/// Phase after phase: the reference for all others.
std::unique_ptr<Policy> serial_policy();
/// Scores and trains a batch while its stragglers still decode, in iterations where the workload says that it
/// pays. On-policy: the samples and the update are those of serial_policy.
std::unique_ptr<Policy> streamed_policy();
/// Decodes batch k+1 with the weights from before batch k while batch k trains.
std::unique_ptr<Policy> one_step_off_policy();
/// Decodes without pause, with the newest weights from one decode step to the next; prompts of iteration k
/// enter once k - max_staleness iterations are published (the admission rule of AReaL, Fu et al. 2025), so no
/// trained token is older. @throws InvalidArgument unless max_staleness >= 1.
std::unique_ptr<Policy> async_policy(std::int64_t max_staleness);

}  // namespace rlhf::schedule

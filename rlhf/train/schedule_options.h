#pragma once

#include <cstdint>
#include <memory>
#include <optional>

#include "rlhf/config/field.h"
#include "rlhf/schedule/policy.h"

namespace rlhf {

enum class ScheduleMode { kSerial, kStreamed, kOneStepOff, kAsync };

/// What runs when; docs/design/scheduler.md explains the modes.
struct ScheduleOptions {
  ScheduleMode mode = ScheduleMode::kSerial;
  std::optional<std::int64_t> max_staleness;  ///< async only; none = 1
  bool require_early_training = false;        ///< refuse algorithms that need the whole batch first

  template <class V>
  void visit_fields(V& v) {
    v.choice(
        "mode", mode,
        {{"serial", ScheduleMode::kSerial},
         {"streamed", ScheduleMode::kStreamed},
         {"one_step_off", ScheduleMode::kOneStepOff},
         {"async", ScheduleMode::kAsync}},
        "serial: phase after phase; streamed: score and train while stragglers decode, with the same "
        "result; one_step_off: decode the next batch with the weights from before; async: decode without "
        "pause, weights change in flight");
    v.field("max_staleness", max_staleness,
            "async: versions that the weights of a token may lie behind those it is trained on; none = 1",
            {0, 1e6});
    v.field("require_early_training", require_early_training,
            "Refuse an algorithm that needs the whole batch before it trains: with one, streamed overlaps "
            "scoring alone");
  }
  void validate(config::Problems& problems) const {
    if (max_staleness && mode != ScheduleMode::kAsync)
      problems.add("max_staleness",
                   "only schedule.mode async reads it; on-policy modes have staleness 0 and "
                   "one_step_off has 1");
    if (mode == ScheduleMode::kAsync && max_staleness == 0)
      problems.add("max_staleness", "0 excludes schedule.mode async; staleness 0 is schedule.mode streamed");
    if (require_early_training && mode == ScheduleMode::kSerial)
      problems.add("require_early_training", "schedule.mode serial trains after the batch; use streamed");
  }

  /// Versions a token may be old when it is trained.
  std::int64_t staleness() const {
    if (mode == ScheduleMode::kAsync) return max_staleness.value_or(1);
    return mode == ScheduleMode::kOneStepOff ? 1 : 0;
  }
  std::unique_ptr<schedule::Policy> make_policy() const {
    switch (mode) {
      case ScheduleMode::kStreamed:
        return schedule::streamed_policy();
      case ScheduleMode::kOneStepOff:
        return schedule::one_step_off_policy();
      case ScheduleMode::kAsync:
        return schedule::async_policy(staleness());
      default:
        return schedule::serial_policy();
    }
  }
};

}  // namespace rlhf

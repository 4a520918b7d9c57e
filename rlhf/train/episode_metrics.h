#pragma once

#include <vector>

#include "rlhf/data/sample.h"
#include "rlhf/train/stage.h"

namespace rlhf {

/// Appends the metrics `episode/...` (docs/reference/metrics.md) of these samples; nothing where no
/// environment has answered any of them.
void append_episode_metrics(const std::vector<const Sample*>& samples, Metrics& metrics);

}  // namespace rlhf

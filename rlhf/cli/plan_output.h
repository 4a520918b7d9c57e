#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "rlhf/cli/prediction.h"
#include "rlhf/train/plan_advice.h"
#include "rlhf/train/run_options.h"

namespace rlhf::cli {

/// Everything that `rlhf plan` prints.
struct Plan {
  RunOptions options;
  PlanSetting setting;
  std::uint64_t budget_bytes = 0;
  std::vector<std::string> assumptions;
  MemoryPlan memory;
  BatchLimits limits;
  std::vector<Advice> advice;                  ///< when it does not fit
  std::optional<ModePredictions> predictions;  ///< with rates and the stage ppo
};

nlohmann::ordered_json to_json(const Plan& plan);
void print_text(const Plan& plan);

}  // namespace rlhf::cli

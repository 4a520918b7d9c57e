#pragma once

#include <memory>
#include <vector>

#include "rlhf/schedule/policy.h"

namespace rlhf::schedule {

inline std::vector<std::unique_ptr<Policy>> all_policies() {
  std::vector<std::unique_ptr<Policy>> policies;
  policies.push_back(serial_policy());
  policies.push_back(streamed_policy());
  policies.push_back(one_step_off_policy());
  policies.push_back(async_policy(1));
  policies.push_back(async_policy(3));
  return policies;
}

}  // namespace rlhf::schedule

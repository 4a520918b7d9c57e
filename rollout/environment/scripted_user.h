#pragma once

#include "rollout/environment/environment.h"

namespace rlhf {

/// A user whose turns stand in the data (Prompt::user_turns): it says one after each turn of the policy; when
/// there are none left, the episode ends.
class ScriptedUserFactory : public EnvironmentFactory {
 public:
  std::unique_ptr<Environment> begin(const EpisodeStart& start) const override;
  bool answers_at_once() const override { return true; }
};

}  // namespace rlhf

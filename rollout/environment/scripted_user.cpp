#include "rollout/environment/scripted_user.h"

namespace rlhf {
namespace {

class ScriptedUser : public Environment {
 public:
  explicit ScriptedUser(const std::vector<std::string>& turns) : turns_(turns) {}

  Observation observe(const AssistantTurn&) override {
    Observation observation;
    observation.over = next_ == turns_.size();
    if (!observation.over) observation.messages = {{"user", turns_[next_++]}};
    return observation;
  }

 private:
  const std::vector<std::string>& turns_;
  std::size_t next_ = 0;
};

}  // namespace

std::unique_ptr<Environment> ScriptedUserFactory::begin(const EpisodeStart& start) const {
  return std::make_unique<ScriptedUser>(start.prompt.user_turns);
}

}  // namespace rlhf

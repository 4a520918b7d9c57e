#include "rlhf/train/ppo_batch.h"

namespace rlhf {

void PpoState::save(std::map<std::string, double>& numbers) const {
  numbers["kl_coefficient"] = kl.coefficient();
  numbers["score_count"] = scores.state().count;
  numbers["score_mean"] = scores.state().mean;
  numbers["score_squares"] = scores.state().squares;
}

void PpoState::restore(const std::map<std::string, double>& numbers) {
  kl.restore(numbers.at("kl_coefficient"));
  scores.restore({numbers.at("score_count"), numbers.at("score_mean"), numbers.at("score_squares")});
}

}  // namespace rlhf

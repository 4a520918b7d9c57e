#include "rlhf/train/ppo_batch.h"

namespace rlhf {

bool needs_whole_batch(const PpoSetting& setting) {
  return ppo::needs_whole_batch(setting.options.algorithm) ||
         TermNormalizers::needs_whole_batch(setting.data.rules);
}

PpoState::PpoState(const PpoSetting& setting)
    : kl(setting.options.algorithm.kl.controller, setting.options.algorithm.kl.coefficient),
      scores(setting.options.algorithm.reward.normalization),
      terms(setting.data.rules) {}

void PpoState::save(std::map<std::string, double>& numbers) const {
  numbers["kl_coefficient"] = kl.coefficient();
  numbers["score_count"] = scores.state().count;
  numbers["score_mean"] = scores.state().mean;
  numbers["score_squares"] = scores.state().squares;
  terms.save(numbers);
}

void PpoState::restore(const std::map<std::string, double>& numbers) {
  kl.restore(numbers.at("kl_coefficient"));
  scores.restore({numbers.at("score_count"), numbers.at("score_mean"), numbers.at("score_squares")});
  terms.restore(numbers);
}

}  // namespace rlhf

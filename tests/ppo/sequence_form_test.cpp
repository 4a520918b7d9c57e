// The sequence form of the advantage stage where a response trains nothing; numbers by hand.
#include "rlhf/config/reader.h"
#include "rlhf/ppo/experience.h"
#include "tests/catch.h"

TEST_CASE("a truncated response that is masked still counts in its group's baseline") {
  auto options = rlhf::config::load_preset<rlhf::ppo::PpoOptions>("trl-grpo");
  options.advantage.group.scale = rlhf::ppo::GroupScale::kNone;
  options.correction = {};
  options.reward.mask_truncated = true;
  std::vector<rlhf::ppo::ScoredResponse> responses(3);
  const double scores[] = {1, 2, 6};
  for (std::size_t i = 0; i < 3; ++i) {
    responses[i].log_probs = {-1, -2};
    responses[i].score = scores[i];
  }
  responses[2].truncated = true;
  const rlhf::ppo::Experience e = rlhf::ppo::compute_experience(options, 0, responses);
  // Mean 3 over all three; the third trains nothing.
  CHECK(e.advantages == std::vector<double>{-2, -2, -1, -1, 0, 0});
  CHECK(e.mask == std::vector<std::uint8_t>{1, 1, 1, 1, 0, 0});
}

// The sequence form of the advantage stage where a response trains nothing; numbers by hand.
#include "rlhf/config/reader.h"
#include "rlhf/core/error.h"
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

TEST_CASE("a response without a score moves nobody's baseline and is not learned from") {
  const double scores[] = {1, 2, 77, 6, -8, 5};  // two groups of three; 77 is no score, nor is -8
  std::vector<rlhf::ppo::ScoredResponse> responses(6);
  for (std::size_t i = 0; i < 6; ++i) {
    responses[i].log_probs = {-1, -2};
    responses[i].score = scores[i];
    responses[i].group = i / 3;
  }
  responses[2].unscored = responses[4].unscored = true;
  auto options = rlhf::config::load_preset<rlhf::ppo::PpoOptions>("trl-grpo");
  options.advantage.group.scale = rlhf::ppo::GroupScale::kNone;
  options.correction = {};
  // Means 1.5 and 5.5.
  CHECK(rlhf::ppo::compute_experience(options, 0, responses).advantages ==
        std::vector<double>{-0.5, -0.5, 0.5, 0.5, 0, 0, 0.5, 0.5, 0, 0, -0.5, -0.5});
  CHECK(rlhf::ppo::compute_experience(options, 0, responses).mask ==
        std::vector<std::uint8_t>{1, 1, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1});
  // A group without any score takes the mean of the others: (1 + 2) / 2.
  responses[3].unscored = responses[5].unscored = true;
  options.advantage.group.baseline = rlhf::ppo::GroupBaseline::kBatchMean;
  CHECK(rlhf::ppo::compute_experience(options, 0, responses).advantages ==
        std::vector<double>{-0.5, -0.5, 0.5, 0.5, 0, 0, 0, 0, 0, 0, 0, 0});
  for (auto& response : responses) response.unscored = true;
  CHECK_THROWS_AS(rlhf::ppo::compute_experience(options, 0, responses), rlhf::InvalidArgument);
}

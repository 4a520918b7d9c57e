// Smaller parts of the advantage stage and of reward models, against plain loops and by hand.
#include <cmath>
#include <limits>

#include "rlhf/core/error.h"
#include "rlhf/core/random.h"
#include "rlhf/ppo/distillation.h"
#include "rlhf/ppo/experience.h"
#include "rlhf/ppo/reward_regression.h"
#include "rlhf/ppo/score_normalizer.h"
#include "tests/catch.h"

using namespace rlhf;
using namespace rlhf::ppo;

namespace {

std::vector<double> normals(std::size_t count, std::uint64_t stream) {
  RandomStream random(11, stream);
  std::vector<double> values(count);
  for (double& value : values) value = random.normal();
  return values;
}

ScoredResponse response(std::size_t tokens, std::uint64_t group, double score) {
  ScoredResponse r;
  r.log_probs.assign(tokens, -1.0);
  r.rollout_log_probs = r.log_probs;
  r.group = group;
  r.score = score;
  return r;
}

// Discounted rewards from here on and nothing else.
PpoOptions reward_to_go() {
  PpoOptions options;
  options.critic_update = CriticUpdate::kNone;
  options.value_positions = ValuePositions::kTokens;
  options.kl.placement = KlRewardPlacement::kNone;
  options.advantage.form = AdvantageForm::kRewardToGo;
  options.advantage.whitening = Whitening::kNone;
  return options;
}

}  // namespace

TEST_CASE("running normalisation has the mean and deviation of all scores so far") {
  ScoreNormalizer running(ScoreNormalization::kRunning);
  const std::vector<double> scores = normals(40, 1);
  std::vector<double> seen;
  for (std::size_t begin = 0; begin < scores.size(); begin += 10) {
    const std::span<const double> batch(scores.data() + begin, 10);
    running.observe(batch);
    seen.insert(seen.end(), batch.begin(), batch.end());
    double mean = 0, squares = 0;
    for (double s : seen) mean += s / static_cast<double>(seen.size());
    for (double s : seen) squares += (s - mean) * (s - mean);
    const double deviation = std::sqrt(squares / static_cast<double>(seen.size() - 1));
    CHECK(running.normalize(0.7) == Approx((0.7 - mean) / (deviation + 1e-8)).epsilon(1e-12));
  }
  // A run that goes on from the three numbers is the same run.
  ScoreNormalizer resumed(ScoreNormalization::kRunning);
  resumed.restore(running.state());
  CHECK(resumed.normalize(0.3) == running.normalize(0.3));
}

TEST_CASE("normalisation against the reference keeps the mean of the first batch") {
  ScoreNormalizer reference(ScoreNormalization::kReference);
  reference.observe(std::vector<double>{1, 2, 6});
  reference.observe(std::vector<double>{100, 200});
  CHECK(reference.normalize(5) == Approx(2));
  ScoreNormalizer none(ScoreNormalization::kNone);
  none.observe(std::vector<double>{1, 2});
  CHECK(none.normalize(5) == 5);
}

TEST_CASE("scores without spread and scores that are not finite") {
  ScoreNormalizer running(ScoreNormalization::kRunning);
  running.observe(std::vector<double>(5, 1e9));
  CHECK(running.deviation() == 0);
  CHECK(running.normalize(1e9) == 0);
  CHECK_THROWS_WITH(running.observe(std::vector<double>{1, std::nan("")}),
                    ContainsSubstring("the score of response 1 is nan"));
}

TEST_CASE("a step's reward is paid at its token, beside the score at the end") {
  PpoOptions options = reward_to_go();
  options.advantage.gae.gamma = 0.5;
  ScoredResponse r = response(4, 0, 8);
  r.step_rewards = {0, 2, 0, 1};
  const Experience e = compute_experience(options, 0, std::vector<ScoredResponse>{r});
  CHECK(e.token_rewards == std::vector<double>{0, 2, 0, 9});
  // 9; 4.5; 2 + 2.25; 2.125
  CHECK(e.advantages == std::vector<double>{2.125, 4.25, 4.5, 9});

  r.mask = {1, 0, 1, 1};  // nothing is paid where the policy did not choose
  const Experience holes = compute_experience(options, 0, std::vector<ScoredResponse>{r});
  CHECK(holes.token_rewards == std::vector<double>{0, 0, 0, 9});
  r.step_rewards.pop_back();
  CHECK_THROWS_WITH(compute_experience(options, 0, std::vector<ScoredResponse>{r}),
                    ContainsSubstring("step rewards"));
}

TEST_CASE("what a clip changes is counted") {
  PpoOptions options = reward_to_go();
  options.reward.score.clip_min = -1;
  options.reward.score.clip_max = 2;
  const std::vector<ScoredResponse> batch = {response(2, 0, 5), response(2, 0, 2), response(2, 1, -1.5),
                                             response(2, 1, 0)};
  const Experience before = compute_experience(options, 0, batch);
  CHECK(before.scores == std::vector<double>{2, 2, -1, 0});
  CHECK(before.metrics.at("objective/clipped_scores_fraction") == 0.5);

  options.reward.clip_stage = ScoreClipStage::kAfterBaseline;
  options.advantage.group.baseline = GroupBaseline::kMean;  // 1.5, -1.5; -0.75, 0.75
  const Experience after = compute_experience(options, 0, batch);
  CHECK(after.metrics.at("objective/clipped_scores_fraction") == 0.25);

  options = reward_to_go();
  CHECK(compute_experience(options, 0, batch).metrics.count("objective/clipped_scores_fraction") == 0);
}

TEST_CASE("KL estimates that are clamped are counted") {
  PpoOptions options = reward_to_go();
  options.kl.placement = KlRewardPlacement::kToken;
  options.kl.coefficient = 0.1;
  options.kl.estimator.clamp = 0.5;
  ScoredResponse r = response(4, 0, 0);
  r.reference_log_probs = {-1, -1.4, -2, 0};  // differences 0, 0.4, 1, -1
  r.mask = {1, 1, 1, 0};
  const Experience e = compute_experience(options, 0.1, std::vector<ScoredResponse>{r});
  CHECK(e.metrics.at("objective/clamped_kl_fraction") == Approx(1.0 / 3));
}

TEST_CASE("sampled distillation: a token's advantage has the teacher's log-ratio, by hand") {
  PpoOptions options = reward_to_go();
  options.distillation.coefficient = 2;
  ScoredResponse r = response(3, 0, 1);
  r.log_probs = {-1, -2, -3};
  r.teacher_log_probs = {-0.5, -2.5, -1};
  r.mask = {1, 1, 0};
  const Experience e = compute_experience(options, 0, std::vector<ScoredResponse>{r});
  // Reward-to-go 1, 1, 0 (the score is at the last token that counts) plus 2 (lp_teacher - lp).
  CHECK(e.advantages == std::vector<double>{2, 0, 0});
  CHECK(e.metrics.at("distillation/kl") == Approx((-0.5 + 0.5) / 2));

  options.distillation.estimate = DistillationEstimate::kExact;  // then it is a loss of its own
  CHECK(compute_experience(options, 0, std::vector<ScoredResponse>{r}).advantages ==
        std::vector<double>{1, 1, 0});
  r.teacher_log_probs.clear();
  CHECK_THROWS_WITH(compute_experience(options, 0, std::vector<ScoredResponse>{r}),
                    ContainsSubstring("teacher log-probs"));
}

TEST_CASE("reverse KL and its gradient: plain sums and central differences in double") {
  constexpr std::size_t V = 7;
  const std::vector<double> z = normals(V, 2), w = normals(V, 3);
  const auto log_softmax = [](std::vector<double> values, double temperature) {
    double sum = 0;
    for (double value : values) sum += std::exp(value / temperature);
    for (double& value : values) value = value / temperature - std::log(sum);
    return values;
  };
  for (const double temperature : {1.0, 0.6, 2.5}) {
    const auto kl_of = [&](const std::vector<double>& logits) {
      const auto p = log_softmax(logits, temperature), q = log_softmax(w, temperature);
      double kl = 0;
      for (std::size_t k = 0; k < V; ++k) kl += std::exp(p[k]) * (p[k] - q[k]);
      return kl;
    };
    const auto p1 = log_softmax(z, 1), q1 = log_softmax(w, 1);
    const std::vector<float> log_p(p1.begin(), p1.end()), log_q(q1.begin(), q1.end());
    std::vector<float> gradient(V);
    CHECK(reverse_kl(log_p, log_q, temperature, 3, gradient) == Approx(kl_of(z)).epsilon(1e-6));
    for (std::size_t k = 0; k < V; ++k) {
      std::vector<double> above = z, below = z;
      above[k] += 1e-5;
      below[k] -= 1e-5;
      const double slope = 3 * (kl_of(above) - kl_of(below)) / 2e-5;
      CHECK(static_cast<double>(gradient[k]) == Approx(slope).margin(1e-6).epsilon(1e-5));
    }
  }
  const std::vector<float> two(2), three(3);
  CHECK_THROWS_WITH(reverse_kl(two, three, 1, 1, {}),
                    ContainsSubstring("2 probabilities of the policy and 3"));
  CHECK_THROWS_WITH(reverse_kl(two, two, 0, 1, {}), ContainsSubstring("temperature is 0"));
}

TEST_CASE("squared error, correlation and calibration of predicted scores, by hand") {
  const std::vector<double> outputs = {1, 2, 3, 4}, targets = {1, 4, 2, 5};
  const RegressionResult loss = regression_loss(outputs, targets);
  CHECK(loss.loss == Approx((0 + 4 + 1 + 1) / 4.0));
  CHECK(loss.d_outputs == std::vector<double>{0, -1, 0.5, -0.5});
  const RegressionQuality quality = regression_quality(outputs, targets, 2);
  CHECK(quality.count == 4);
  CHECK(quality.mean_squared_error == Approx(1.5));
  // Distances from the means 2.5 and 3: products 3, -0.5, -0.5, 3 = 5; squares 5 and 10.
  CHECK(quality.correlation == Approx(5 / std::sqrt(50.0)));
  // Bins {1, 2} and {3, 4}: |0 + 2| + |-1 + 1| over 4.
  CHECK(quality.calibration_error == Approx(0.5));
  CHECK(regression_quality(outputs, std::vector<double>(4, 2.0), 2).correlation == 0);
  CHECK_THROWS_WITH(regression_loss(outputs, std::vector<double>{1}),
                    ContainsSubstring("4 outputs for 1 targets"));
  CHECK_THROWS_WITH(regression_loss(std::vector<double>{1}, std::vector<double>{std::nan("")}),
                    ContainsSubstring("target 0 is nan"));
}

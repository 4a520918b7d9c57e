// Weights, gates, schedules and normalisation of reward terms: the formula, and that a run learns from it.
#include <algorithm>
#include <cmath>

#include "rlhf/train/term_normalizers.h"
#include "tests/catch.h"
#include "tests/train/tiny_run.h"

namespace rlhf {
namespace {

using Start = PipelineSettings::Start;

class Constant : public RewardTerm {
 public:
  std::string_view name() const override { return "constant"; }
  double score(const ScoredSample&) const override { return 0; }
};

RewardComposition two_terms(TermOptions first, TermOptions second) {
  RewardComposition rules;
  first.name = "first";
  second.name = "second";
  rules.add(std::make_unique<Constant>(), std::move(first));
  rules.add(std::make_unique<Constant>(), std::move(second));
  return rules;
}

std::vector<const Score*> pointers(const std::vector<Score>& scores) {
  std::vector<const Score*> out;
  for (const Score& score : scores) out.push_back(&score);
  return out;
}

std::vector<Score> scores_of(const std::vector<std::vector<double>>& values) {
  std::vector<Score> scores;
  for (const auto& row : values) scores.push_back({0, row, row});
  return scores;
}

TEST_CASE("terms normalised in their group are TRL's normalize_then_sum") {
  const RewardComposition rules = two_terms({.weight = 2, .normalize = TermNormalization::kGroup},
                                            {.weight = 0.5, .normalize = TermNormalization::kGroup});
  REQUIRE(rules.normalizes());
  CHECK_FALSE(TermNormalizers::needs_whole_batch(rules));
  const auto scores = scores_of({{1, 0.5}, {0, 0.25}, {1, -1}, {1, 0.5}, {0, 3}, {0, 1}, {0, 2}, {0, 2.5}});
  // TRL 1.16.0, GRPOTrainer with multi_objective_aggregation="normalize_then_sum": rewards of two prompts
  // with four responses, before the batch normalisation; its deviation has a factor in single precision.
  const std::vector<double> expected = {1.304393500145950,  -2.868860014555048, 0.260073014263150,
                                        1.304393500145950,  0.512287537690852,  -0.658655405602525,
                                        -0.073183933955836, 0.219551801867508};
  const TermNormalizers normalizers(rules);
  const auto all = pointers(scores);
  for (const std::size_t group : {0, 1}) {
    const auto totals = normalizers.totals(std::span(all).subspan(4 * group, 4), 1);
    for (std::size_t k = 0; k < 4; ++k) CHECK(totals[k] == Approx(expected[4 * group + k]).epsilon(1e-7));
  }
  CHECK(normalizers.totals(std::span(all).first(1), 1) == std::vector<double>{0});
}

TEST_CASE("running moments of a term go over all batches, and through a checkpoint") {
  const RewardComposition rules =
      two_terms({.weight = 2, .schedule = {{1, 1}, {3, 0}}, .normalize = TermNormalization::kRunning}, {});
  CHECK(TermNormalizers::needs_whole_batch(rules));
  TermNormalizers whole(rules), stopped(rules);
  const auto first = scores_of({{1, 1}, {2, 0}, {6, 0}}), second = scores_of({{4, 10}, {-3, 0}});
  whole.observe(pointers(first));
  stopped.observe(pointers(first));
  std::map<std::string, double> numbers;
  stopped.save(numbers);
  TermNormalizers resumed(rules);
  resumed.restore(numbers);
  whole.observe(pointers(second));
  resumed.observe(pointers(second));
  const auto totals = whole.totals(pointers(second), 2);
  CHECK(resumed.totals(pointers(second), 2) == totals);
  // 1 2 6 4 -3: mean 2, variance (1 + 0 + 16 + 4 + 25) / 4; the schedule is half way.
  const double deviation = std::sqrt(46.0 / 4);
  CHECK(totals[0] == Approx(1 * 2 / deviation + 10));
  CHECK(totals[1] == Approx(1 * -5 / deviation));
}

// A run on two rules, with these options of the first and of the second.
Attempt run(const TinyData& data, const std::string& name, const std::string& first,
            const std::string& second = "", std::vector<std::string> more = {}) {
  std::vector<std::string> overrides = {
      "stages=[ppo]",
      "ppo.reward_model_weight=0",
      "ppo.critic_init=policy",
      "ppo.iterations=4",
      "ppo.algorithm.samples_per_prompt=3",
      "ppo.algorithm.optimizer.epsilon=0.1",
      "ppo.algorithm.optimizer.learning_rate=0.02",
      "rewards=[{type: length, min_tokens: 2, max_tokens: 4, slope_tokens: 3" + first +
          "}, {type: regex, pattern: '[a-m]', name: letters, weight: 2" + second + "}]"};
  overrides.insert(overrides.end(), more.begin(), more.end());
  return attempt(data.options(name, overrides), Start::kFresh);
}

std::string policy(const TinyData& data, const std::string& name) {
  return read_text_file(data.path(name) / "checkpoints" / "ppo.final.safetensors");
}

TEST_CASE("every option of a term changes what is learned, and metrics say what it did") {
  const TinyData data;
  const Attempt plain = run(data, "plain", "");
  const std::map<std::string, std::string> options = {
      {"clip_min", ", clip_min: -0.3"},
      {"clip_max", ", clip_max: -0.4"},
      {"gate", ", gate: {term: letters, min: 1}"},
      {"otherwise", ", gate: {term: letters, min: 1, otherwise: -1}"},
      {"min", ", gate: {term: letters, min: 2}"},
      {"schedule", ", schedule: [{iteration: 1, factor: 2}, {iteration: 4, factor: 0.5}]"},
      {"group", ", normalize: group"},
      {"running", ", normalize: running"}};
  std::map<std::string, std::string> seen = {{policy(data, "plain"), "plain"}};
  std::map<std::string, Attempt> runs;
  for (const auto& [name, text] : options) {
    runs[name] = run(data, name, text);
    const auto [other, is_new] = seen.emplace(policy(data, name), name);
    INFO(name << " learns the same as " << other->second);
    CHECK(is_new);
  }
  const auto of = [&](const std::string& name, std::int64_t step, const std::string& metric_name) {
    return metric(runs.at(name).steps.at({"ppo", step}), "reward/length_" + metric_name, NAN);
  };
  CHECK(of("schedule", 1, "weight") == 2);
  CHECK(of("schedule", 2, "weight") == 1.5);
  CHECK(of("schedule", 4, "weight") == 0.5);
  double clipped = 0;
  for (std::int64_t step = 1; step <= 4; ++step) clipped = std::max(clipped, of("clip_max", step, "clipped"));
  CHECK(clipped > 0);
  CHECK(of("gate", 1, "gated") > 0);
  CHECK(of("gate", 1, "gated") < 1);
  CHECK(of("min", 1, "gated") == 1);
  const Metrics& first = plain.steps.at({"ppo", 1});
  CHECK(metric(first, "reward/length_share", 0) + metric(first, "reward/letters_share", 0) == Approx(1));
  CHECK(std::isnan(metric(first, "reward/length_clipped", NAN)));
  // Both normalised in their groups: the mean of what is learned is 0, and that of the rules is not.
  const Attempt both = run(data, "both", ", normalize: group", ", normalize: group");
  CHECK_THAT(metric(both.steps.at({"ppo", 1}), "reward/total", 1), Catch::Matchers::WithinAbs(0, 1e-12));
  CHECK(metric(both.steps.at({"ppo", 1}), "reward/rules", 0) == metric(first, "reward/rules", 1));
  // A term that weighs nothing is reported and changes nothing.
  run(data, "watched", "", "",
      {"rewards=[{type: length, min_tokens: 2, max_tokens: 4, slope_tokens: 3}, {type: "
       "regex, pattern: '[a-m]', name: letters, weight: 2}, {type: regex, pattern: 'x', "
       "weight: 0}]"});
  CHECK((policy(data, "watched") == policy(data, "plain")));
}

TEST_CASE("evaluation scores by gates and clips, without schedules and normalisation") {
  const TinyData data;
  const std::vector<std::string> judged = {"stages=[ppo, eval]", "ppo.iterations=1", "eval.base=true"};
  const auto base = [&](const std::string& name, const std::string& options) {
    const Attempt done = run(data, name, options, "", judged);
    return done.report.tasks.at(0).stages.at(0).score;
  };
  const double plain = base("plain", "");
  CHECK(base("schedule", ", schedule: [{iteration: 1, factor: 0}]") == plain);
  CHECK(base("group", ", normalize: group") == plain);
  CHECK(base("gate", ", gate: {term: letters, min: 2, otherwise: 9}") > plain);
}

TEST_CASE("options of terms that cannot work are refused with their key") {
  const TinyData data;
  const auto refused = [&](std::vector<std::string> overrides, const std::string& message) {
    INFO(message);
    CHECK_THROWS_WITH(data.options("run", std::move(overrides)), ContainsSubstring(message));
  };
  refused({"rewards=[{type: length, clip_min: 2, clip_max: 1}]"},
          "rewards.0.clip_min: expected clip_min <= clip_max, got 2 and 1");
  refused({"rewards=[{type: length, schedule: [{iteration: 3}, {iteration: 2}]}]"},
          "rewards.0.schedule: iterations must grow from point to point: 2 comes after 3");
  refused({"rewards=[{type: length, schedule: [{iteration: 0}]}]"}, "rewards.0.schedule.0.iteration");
  refused({"rewards=[{type: length, gate: {min: 2}}]"}, "rewards.0.gate.term");
  refused({"rewards=[{type: length}, {type: regex, normalize: group}]", "ppo.algorithm.samples_per_prompt=1"},
          "rewards.1.normalize: group needs ppo.algorithm.samples_per_prompt of at least 2");
  refused({"rewards=[{type: length, normalize: running}]", "stages=[rejection_sampling]"},
          "rewards.0.normalize: running is for the stage ppo");
  refused({"rewards=[{type: length, normalize: running}]", "schedule.require_early_training=true",
           "ppo.algorithm.advantage.whitening=none"},
          "schedule.require_early_training: excludes rewards.0.normalize");
  refused({"rewards=[{type: length, normalize: group}]", "ppo.algorithm.advantage.greedy_baseline=true"},
          "rewards.0.normalize: goes with no ppo.algorithm.advantage.greedy_baseline");
  // The caller may add terms, so names are known when the run begins, before anything is trained or removed.
  RunObserver silent;
  Pipeline pipeline(data.options("run", {"rewards=[{type: length, gate: {term: lengths}}]"}), {}, silent);
  CHECK_THROWS_WITH(pipeline.run(), ContainsSubstring("gate.term is \"lengths\", expected another term"));
}

}  // namespace
}  // namespace rlhf

// Reward models that predict numbers: of answers, by one or several objectives, and of the steps of answers.
#include <algorithm>
#include <cmath>
#include <set>

#include "rlhf/core/error.h"
#include "rlhf/train/build_task.h"
#include "rlhf/train/reward_rating.h"
#include "tests/catch.h"
#include "tests/train/gradient_check.h"
#include "tests/train/tiny_run.h"

namespace rlhf {
namespace {

RewardReadingOptions steps_options() {
  RewardReadingOptions options;
  options.target = RewardTarget::kSteps;
  return options;
}

std::vector<TokenId> bytes(const std::string& text) {
  return {text.begin(), text.end()};
}

double result(const RunReport& report, const std::string& name) {
  for (const auto& [key, value] : report.metrics)
    if (key == name) return value;
  return std::nan("");
}

/// Share of a response's tokens that are different.
class Variety : public RewardTerm {
 public:
  std::string_view name() const override { return "variety"; }
  double score(const ScoredSample& scored) const override {
    const std::set<TokenId> different(scored.sample.tokens.begin(), scored.sample.tokens.end());
    return static_cast<double>(different.size()) / static_cast<double>(scored.sample.tokens.size());
  }
};

// Outputs of a reward model in double, at some positions of a sequence.
std::vector<double> double_outputs(const Parameters<double>& parameters, const std::vector<TokenId>& tokens,
                                   const std::vector<std::size_t>& positions) {
  ThreadPool pool(1);
  SequencePass<double> pass(parameters.config(), Compute<double>(pool, kernels::CpuIsa::kBaseline));
  const PackedRows packed({tokens});
  pass.forward(parameters.weights(), packed, SequencePass<double>::Keep::kNothing);
  std::vector<std::int64_t> rows;
  for (const std::size_t position : positions)
    rows.push_back(packed.row(0, static_cast<std::int64_t>(position)));
  std::vector<double> values(rows.size() * static_cast<std::size_t>(parameters.config().num_labels));
  pass.scalar_outputs(parameters.weights(), rows, values);
  return values;
}

Parameters<float> new_reward_model(const RewardReading& reading) {
  ModelConfig config = LanguageModel::create(tiny_model(), {}, 4).config();
  config.scalar_head = true;
  config.num_labels = static_cast<std::int64_t>(reading.num_outputs());
  Parameters<float> reward(config, {}, nullptr);
  reward.initialise(8, 0.3);
  reward.initialise_score_head(9);
  return reward;
}

// The gradient of one step on `rated` against central differences of the mean square in double.
void check_rating_gradient(const RewardReading& reading, const std::vector<RatedExample>& rated) {
  Lane lane;
  Parameters<float> reward = new_reward_model(reading);
  Parameters<double> in_double = to_double(reward, {});
  const std::vector<float> before(reward.trainable().begin(), reward.trainable().end());
  RewardModelOptions options;
  options.max_steps = 1;
  options.pairs_per_step = static_cast<std::int64_t>(rated.size());
  options.max_tokens_per_micro_batch = 30;  // several micro-batches: the mean is over the whole step
  options.optimizer = gradient_step();
  run_reward_rating(reward, rated, reading, options, lane.context);
  const auto loss = [&] {
    double sum = 0, count = 0;
    for (const RatedExample& item : rated) {
      const auto outputs = double_outputs(in_double, item.example.tokens, item.positions);
      REQUIRE(outputs.size() == item.targets.size());
      for (std::size_t i = 0; i < outputs.size(); ++i) {
        sum += (outputs[i] - item.targets[i]) * (outputs[i] - item.targets[i]);
        ++count;
      }
    }
    return sum / count;
  };
  CHECK(metric(lane.watcher.steps.at({"reward", 1}), "loss", -1) == Approx(loss()).epsilon(1e-5));
  check_gradient(before, reward, in_double, loss);
}

}  // namespace

TEST_CASE("steps end where their separator ends; the rest ends with the answer") {
  const LanguageModel model = LanguageModel::create(tiny_model(), {}, 4);
  const RewardReading reading(steps_options(), &model.tokenizer(), model.end_tokens());
  const auto positions = [&](const std::string& prompt, const std::string& answer, bool ends) {
    std::vector<TokenId> tokens = bytes(prompt + answer);
    std::vector<std::uint8_t> mask(prompt.size(), 0);
    mask.resize(tokens.size(), 1);
    if (ends) {
      tokens.push_back(model.end_token());
      mask.push_back(1);
    }
    return reading.positions(tokens, mask);
  };
  using Positions = std::vector<std::size_t>;
  CHECK(positions("q\n", "ab\ncd", false) == Positions{4, 6});
  CHECK(positions("q\n", "ab\ncd", true) == Positions{4, 7});  // the end token has seen the last step
  CHECK(positions("q\n", "ab\ncd\n", true) == Positions{4, 7});
  CHECK(positions("", "\n\nab\n\n\ncd", false) == Positions{4, 8});  // empty steps are none
  CHECK(positions("q", "abc", false) == Positions{3});
  CHECK(positions("q", "", true) == Positions{1});
  CHECK(positions("q", "\n", false) == Positions{1});

  // What a tool wrote is no text of the answer.
  CHECK(reading.positions(bytes("a\nb\n"), std::vector<std::uint8_t>{1, 0, 1, 1}) == Positions{3});
  CHECK_THROWS_WITH(reading.positions({}, {}), ContainsSubstring("an empty sequence has no score"));
}

TEST_CASE("outputs become a score: weighted objectives, and the steps' minimum, mean, last or sum") {
  RewardReadingOptions options;
  options.target = RewardTarget::kScores;
  options.objectives = {{"helpful", 0.5}, {"safe", 2}};
  CHECK(RewardReading(options, nullptr, {}).score(std::vector<double>{4, -1}) == 0);
  CHECK_THROWS_WITH(RewardReading(options, nullptr, {}).score(std::vector<double>{1, 2, 3}),
                    ContainsSubstring("3 outputs for 2 objectives"));
  const LanguageModel model = LanguageModel::create(tiny_model(), {}, 4);
  RewardReadingOptions steps = steps_options();
  const std::vector<double> outputs = {3, -1, 4};
  const auto score = [&](StepScore kind) {
    steps.step_score = kind;
    return RewardReading(steps, &model.tokenizer(), {}).score(outputs);
  };
  CHECK(score(StepScore::kMin) == -1);
  CHECK(score(StepScore::kMean) == 2);
  CHECK(score(StepScore::kLast) == 4);
  CHECK(score(StepScore::kSum) == 6);
}

TEST_CASE("the gradient of the squared error equals central differences: objectives and steps") {
  const LanguageModel model = LanguageModel::create(tiny_model(), {}, 4);
  RewardReadingOptions two;
  two.target = RewardTarget::kScores;
  two.objectives = {{"a", 1}, {"b", 1}};
  const RewardReading objectives(two, nullptr, {}), steps(steps_options(), &model.tokenizer(), {});
  std::vector<RatedExample> scored, stepped;
  for (std::size_t i = 0; i < 4; ++i) {
    const std::vector<TokenId> tokens = random_tokens(6 + 4 * i, 60 + i);
    const auto x = static_cast<double>(i);
    scored.push_back(
        {{tokens, std::vector<std::uint8_t>(tokens.size(), 1)}, {tokens.size() - 1}, {x, 1 - x}});
    std::vector<TokenId> lines = bytes("ab\ncde\nf" + std::string(i, 'g'));
    const std::vector<std::uint8_t> mask(lines.size(), 1);
    const auto positions = steps.positions(lines, mask);
    stepped.push_back({{std::move(lines), mask}, positions, {x, 0.5, -x}});
  }
  check_rating_gradient(objectives, scored);
  check_rating_gradient(steps, stepped);
}

TEST_CASE("a reward model learns ratings, and the run tells how well") {
  const TinyData data;
  std::string ratings, steps;
  for (const std::string word : {"buy", "sell", "hold", "wait"})
    for (int i = 0; i < 3; ++i) {
      const std::string prompt =
          R"({"prompt": "on )" + std::string(1, static_cast<char>('a' + i)) + R"(: ", )";
      const double first = word < "hold" ? 1 : -1, second = word < "k" ? 0.5 : 2;
      ratings += prompt + concat(R"("response": ")", word, R"(", "scores": [)", first, ", ", second, "]}\n");
      steps += prompt + concat(R"("response": ")", word, R"(\nthen )", word, R"(", "step_scores": [)", first,
                               ", ", second, "]}\n");
    }
  data.folder().write("ratings.jsonl", ratings);
  data.folder().write("steps.jsonl", steps);
  const auto options = [&](const std::string& file, std::vector<std::string> more) {
    std::vector<std::string> overrides = {"stages=[reward, ppo]",
                                          "reward.max_steps=80",
                                          "reward.pairs_per_step=6",
                                          "ppo.iterations=2",
                                          "ppo.critic_init=policy",
                                          "data.ratings_file=" + data.path(file).string(),
                                          "data.held_out_ratings_file=" + data.path(file).string()};
    overrides.insert(overrides.end(), more.begin(), more.end());
    return data.options("run_" + file, overrides);
  };
  const Attempt scores = attempt(
      options("ratings.jsonl", {"reward.target=scores",
                                "reward.objectives=[{name: up, weight: 3}, {name: size, weight: -0.5}]"}),
      PipelineSettings::Start::kFresh);
  for (const char* name : {"up", "size"}) {
    INFO(name);
    CHECK(result(scores.report, std::string("reward_model/ratings/") + name) == 12);
    CHECK(result(scores.report, std::string("reward_model/correlation/") + name) > 0.9);
    CHECK(result(scores.report, std::string("reward_model/squared_error/") + name) < 0.2);
  }
  CHECK(result(scores.report, "reward_model/pairs") == 5);  // held-out pairs judge such a model as well
  const Metrics& step = scores.steps.at({"ppo", 1});
  CHECK(metric(step, "reward/model", 0) ==
        Approx(3 * metric(step, "reward/model/up", 0) - 0.5 * metric(step, "reward/model/size", 0)));

  const auto stepped = [&](const std::string& name, bool placed) {
    return attempt(
        options("steps.jsonl", {"reward.target=steps", concat("ppo.step_rewards=", placed ? "true" : "false"),
                                "run.dir=" + data.path(name).string()}),
        PipelineSettings::Start::kFresh);
  };
  const Attempt as_score = stepped("as_score", false), placed = stepped("placed", true);
  CHECK(result(as_score.report, "reward_model/ratings") == 24);
  CHECK(result(as_score.report, "reward_model/correlation") > 0.8);
  const Metrics &a = as_score.steps.at({"ppo", 1}), &b = placed.steps.at({"ppo", 1});
  CHECK(metric(a, "reward/model", 0) == metric(b, "reward/model", 1));
  // Placed, the model's rewards are not part of the score.
  CHECK(metric(b, "objective/scores", 9) == Approx(metric(b, "reward/rules", 0)));
  CHECK(metric(a, "objective/scores", 9) ==
        Approx(metric(a, "reward/rules", 0) + 0.5 * metric(a, "reward/model", 0)));
}

TEST_CASE("ratings that do not fit are refused with file, line and what was expected") {
  const TinyData data;
  const auto error_of = [&](const std::string& line, std::vector<std::string> overrides) {
    data.folder().write("ratings.jsonl", R"({"prompt": "p", "response": "ok", "score": 1})"
                                         "\n" +
                                             line + "\n");
    overrides.insert(overrides.end(),
                     {"stages=[reward]", "data.ratings_file=" + data.path("ratings.jsonl").string()});
    const RunOptions options = data.options("run", overrides);
    try {
      build_task(options, load_policy(options));
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string("no error");
  };
  const std::vector<std::string> scores = {"reward.target=scores"};
  CHECK_THAT(
      error_of(R"({"prompt": "p", "response": "r"})", scores),
      ContainsSubstring("ratings.jsonl:2: expected one of \"score\", \"scores\" and \"step_scores\", got 0"));
  CHECK_THAT(error_of(R"({"prompt": "p", "response": "r", "score": "good"})", scores),
             ContainsSubstring("ratings.jsonl:2: key \"score\": got \"good\", expected a number"));
  CHECK_THAT(error_of(R"({"prompt": "p", "response": "r", "score": NaN})", scores),
             ContainsSubstring("ratings.jsonl:2"));
  CHECK_THAT(error_of(R"({"prompt": "p", "response": "r", "scores": [1, null]})", scores),
             ContainsSubstring("key \"scores\": got null, expected a number"));
  CHECK_THAT(error_of(R"({"prompt": "p", "response": "r", "scores": [1, 2]})", scores),
             ContainsSubstring("ratings.jsonl:2: 2 scores, expected 1 (reward.objectives)"));
  CHECK_THAT(error_of(R"({"prompt": "p", "response": "r", "step_scores": [1]})", scores),
             ContainsSubstring("\"step_scores\" need reward.target: steps"));
  CHECK_THAT(error_of(R"({"prompt": "p", "response": "r", "step_scores": [1]})", {"reward.target=steps"}),
             ContainsSubstring("ratings.jsonl:1: expected \"step_scores\""));
  data.folder().write("steps.jsonl", R"({"prompt": "p", "response": "no separator", "step_scores": [1, 0]})"
                                     "\n");
  const RunOptions options = data.options("run", {"stages=[reward]", "reward.target=steps",
                                                  "data.ratings_file=" + data.path("steps.jsonl").string()});
  CHECK_THROWS_WITH(build_task(options, load_policy(options)),
                    ContainsSubstring("steps.jsonl:1: 2 step_scores for a response of 1 steps, which "
                                      "reward.step_separator \"\\n\" ends"));
  const auto refused = [&](std::vector<std::string> overrides, const std::string& message) {
    INFO(message);
    CHECK_THROWS_WITH(data.options("run", std::move(overrides)), ContainsSubstring(message));
  };
  refused({"reward.target=scores"}, "data.ratings_file: the stage 'reward' needs this file");
  refused({"reward.objectives=[{name: a}]"}, "reward.objectives: only target: scores has several objectives");
  refused({"reward.target=scores", "reward.objectives=[{name: a}, {name: a}]"},
          "reward.objectives: the name 'a' is given twice");
  refused({"reward.target=steps", "reward.step_separator=\"\""}, "reward.step_separator: must not be empty");
  refused({"reward.target=scores", "data.ratings_file=x", "reward.objectives=[{name: a}, {name: b}]"},
          "ppo.critic_init: a reward model of several objectives has no single value");
}

TEST_CASE("normalised scores: the first batch has mean 0, and with running deviation 1") {
  const TinyData data;
  const auto first_step = [&](const std::string& kind) {
    const Attempt run = attempt(
        data.options("run_" + kind, {"stages=[reward, ppo]", "ppo.iterations=2", "ppo.critic_init=policy",
                                     "ppo.algorithm.prompts_per_step=5", "ppo.algorithm.samples_per_prompt=6",
                                     "ppo.algorithm.reward.normalization=" + kind}),
        PipelineSettings::Start::kFresh);
    return run.steps.at({"ppo", 1});
  };
  const Metrics plain = first_step("none"), running = first_step("running"),
                reference = first_step("reference");
  CHECK(metric(plain, "objective/scores", 0) == Approx(metric(plain, "reward/total", 1)));
  CHECK(std::abs(metric(plain, "objective/scores", 0)) > 0.01);
  for (const Metrics& metrics : {running, reference}) {
    CHECK(metric(metrics, "reward/total", 1) == metric(plain, "reward/total", 0));
    CHECK(metric(metrics, "objective/scores", 1) == Approx(0).margin(1e-9));
  }
}

TEST_CASE("a run that follows its reward model away from the rules warns in log and report (seed 3)") {
  const TinyData data;
  // Nothing but the reward model is followed: answers become alike, and the rule wants variety.
  const auto options =
      data.options("run", {"stages=[sft, reward, ppo]", "rewards=[]", "sft.max_steps=1",
                           "reward.max_steps=40", "ppo.iterations=60", "ppo.rules_weight=0",
                           "ppo.reward_model_weight=1", "ppo.critic_init=policy",
                           "ppo.algorithm.samples_per_prompt=8", "ppo.algorithm.optimizer.learning_rate=0.01",
                           "ppo.algorithm.kl.coefficient=0", "rollout.max_sequences=24"});
  Watcher watcher(nullptr);
  Pipeline pipeline(options, {}, watcher);
  pipeline.add_reward(std::make_unique<Variety>(), {});
  const RunReport report = pipeline.run();
  const auto rings = [](const std::vector<std::string>& texts) {
    return std::ranges::count_if(texts, [](const std::string& text) {
      return text.find("the reward model's score rose") != std::string::npos;
    });
  };
  std::string series;
  for (std::int64_t step = 1; step <= 60; step += 4)
    series += concat(metric(watcher.steps.at({"ppo", step}), "reward/model", 0), " ",
                     metric(watcher.steps.at({"ppo", step}), "reward/rules", 0), "; ");
  INFO("reward model and rules, every fourth step: " << series);
  CHECK(rings(report.warnings) >= 1);
  CHECK(rings(watcher.messages) == rings(report.warnings));
}

TEST_CASE("ReMax with a reward model: the greedy response is judged by it, too") {
  const TinyData data;
  const auto largest_advantage = [&](const std::string& name, const std::string& temperature) {
    const auto options = data.options(
        name,
        {"stages=[sft, reward, ppo]", "sft.max_steps=1", "ppo.iterations=1", "ppo.reward_model_weight=2",
         "ppo.critic_init=policy", "ppo.algorithm.critic_update=none", "ppo.algorithm.kl.placement=none",
         "ppo.algorithm.samples_per_prompt=20", "ppo.algorithm.value_positions=tokens",
         "ppo.algorithm.advantage={form: reward_to_go, greedy_baseline: true, whitening: none}",
         "rollout.sampling.temperature=" + temperature});
    const Attempt run = attempt(options, PipelineSettings::Start::kFresh);
    CHECK(std::abs(metric(run.steps.at({"ppo", 1}), "reward/model", 0)) > 1e-4);
    return metric(run.steps.at({"ppo", 1}), "advantage/abs_max", -1);
  };
  // Samples at a temperature near 0 are the greedy response: nothing is left of their scores, up to the
  // rounding of passes of different sizes.
  CHECK(largest_advantage("cold", "0.0001") < 1e-5);
  CHECK(largest_advantage("warm", "1") > 0.01);
}

}  // namespace rlhf

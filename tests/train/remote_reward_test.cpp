// Runs whose rewards come from a server on loopback.
#include <atomic>
#include <cmath>
#include <nlohmann/json.hpp>
#include <regex>

#include "rlhf/core/error.h"
#include "rlhf/core/hash.h"
#include "tests/catch.h"
#include "tests/reward/http_server.h"
#include "tests/train/tiny_run.h"

namespace rlhf {
namespace {

using Start = PipelineSettings::Start;
using Json = nlohmann::json;

// What `rewards: [{type: regex, pattern: '[a-m]'}]` says.
double letters(const Json& asked) {
  return std::regex_search(asked["responses"][0].get<std::string>(), std::regex("[a-m]"));
}

void answer(httplib::Response& response, double reward) {
  response.set_content(Json{{"rewards", {reward}}}.dump(), "application/json");
}

Attempt run(const TinyData& data, const std::string& name, const std::string& rewards,
            std::vector<std::string> more = {}, Start start = Start::kFresh) {
  std::vector<std::string> overrides = {"stages=[ppo, eval]",
                                        "ppo.reward_model_weight=0",
                                        "ppo.critic_init=policy",
                                        "ppo.algorithm.samples_per_prompt=3",
                                        "ppo.algorithm.optimizer.learning_rate=0.02",
                                        "run.checkpoint_every=1",
                                        "rewards=" + rewards};
  overrides.insert(overrides.end(), more.begin(), more.end());
  return attempt(data.options(name, overrides), start);
}

std::string asking(const RewardServer& server, const std::string& more = "", const std::string& http = "") {
  return "[{type: http, name: remote" + more + ", http: {url: '" + server.url() + "'" + http + "}}]";
}

std::uint64_t policy(const TinyData& data, const std::string& name) {
  const std::string file = read_text_file(data.path(name) / "checkpoints" / "ppo.final.safetensors");
  return hash_values(std::span<const char>(file));
}

TEST_CASE("a run scored by a server learns bit for bit what a run on the same rule learns") {
  const TinyData data;
  std::atomic<int> asked{0};
  const RewardServer server([&](const httplib::Request& request, httplib::Response& response) {
    // Answers come in another order than the questions.
    std::this_thread::sleep_for(std::chrono::milliseconds(asked++ % 3 * 5));
    answer(response, letters(Json::parse(request.body)));
  });
  const Attempt local = run(data, "local", "[{type: regex, pattern: '[a-m]', name: remote}]");
  for (const char* mode : {"serial", "streamed"}) {
    asked = 0;
    const Attempt remote = run(data, mode, asking(server), {std::string("schedule.mode=") + mode});
    CHECK(policy(data, mode) == policy(data, "local"));
    for (const auto& [step, metrics] : local.steps)
      if (step.first == "ppo")
        CHECK(metric(remote.steps.at(step), "reward/remote", -1) == metric(metrics, "reward/remote", -2));
    // 4 iterations of 9 responses; evaluation of 5 prompts before and after, greedy and twice sampled.
    CHECK(asked == 4 * 9 + 2 * 5 * (1 + 2));
  }
}

TEST_CASE("a response that the server never judges is dropped and accounted for") {
  const TinyData data;
  const RewardServer server([&](const httplib::Request& request, httplib::Response& response) {
    const Json asked = Json::parse(request.body);
    const auto prompt = asked["prompts"][0].get<std::string>();
    if (prompt == "now gold: " || prompt == "now oil: ")
      std::this_thread::sleep_for(std::chrono::milliseconds(1500));
    answer(response, letters(asked));
  });
  // The server lets five connections wait; a further one would be tried again after a second.
  const std::string short_wait = ", timeout_s: 0.8, attempts: 1, max_in_flight: 4";
  const std::vector<std::string> options = {"stages=[ppo]", "ppo.iterations=2"};
  const Attempt dropped = run(data, "drop", asking(server, ", on_failure: drop", short_wait), options);
  const Attempt counted =
      run(data, "score", asking(server, ", on_failure: score, failure_score: -2", short_wait), options);
  CHECK(policy(data, "drop") != policy(data, "score"));
  double all = 0;
  for (std::int64_t step : {1, 2}) {
    const Metrics& metrics = dropped.steps.at({"ppo", step});
    // Three responses to each of three prompts, of which at most two are not answered.
    const double failed = 3 * metric(metrics, "reward/remote_failed", -1);
    CHECK(failed == Approx(std::round(failed)));
    CHECK(failed <= 2);
    all += failed;
    CHECK(3 * metric(metrics, "train/without_gradient", -1) == Approx(failed));
    CHECK(metric(metrics, "time/judge_s", 0) >= (failed > 0 ? 0.1 : 0));
    CHECK(3 * metric(counted.steps.at({"ppo", step}), "reward/remote_failed", -1) == Approx(failed));
    CHECK(metric(counted.steps.at({"ppo", step}), "train/without_gradient", -1) == 0);
  }
  CHECK(all > 0);
  CHECK(read_text_file(data.path("drop") / "samples" / "ppo.jsonl").find("gave no answer within 0.8 s") !=
        std::string::npos);
}

TEST_CASE("a run that stops for want of its server goes on where it stopped") {
  const TinyData data;
  std::atomic<int> asked{0};
  std::atomic<bool> broken{true};
  const RewardServer server([&](const httplib::Request& request, httplib::Response& response) {
    if (broken && ++asked > 20) {
      response.status = 500;
      return;
    }
    answer(response, letters(Json::parse(request.body)));
  });
  const std::string rewards = asking(server, "", ", attempts: 1");
  const std::vector<std::string> only_ppo = {"stages=[ppo]"};
  REQUIRE_THROWS_WITH(run(data, "stopped", rewards, only_ppo),
                      ContainsSubstring("ppo: iteration 3: reward term \"remote\", prompt") &&
                          ContainsSubstring(server.url()) && ContainsSubstring("HTTP 500"));
  broken = false;
  const Attempt resumed = run(data, "stopped", rewards, only_ppo, Start::kResume);
  CHECK(resumed.steps.count({"ppo", 2}) == 0);
  CHECK(resumed.steps.count({"ppo", 4}) == 1);
  run(data, "whole", rewards, only_ppo);
  CHECK((policy(data, "stopped") == policy(data, "whole")));
}

TEST_CASE("what a server cannot go with is refused with both keys") {
  const TinyData data;
  const auto refused = [&](const std::string& rewards, std::vector<std::string> more = {}) {
    more.push_back("rewards=" + rewards);
    try {
      data.options("refused", more);
    } catch (const ConfigError& error) {
      return std::string(error.what());
    }
    return std::string("accepted");
  };
  CHECK_THAT(refused("[{type: http}]"), ContainsSubstring("http: {url: ...}"));
  CHECK_THAT(refused("[{type: regex, pattern: a, http: {url: 'http://h/'}}]"),
             ContainsSubstring("type: http"));
  CHECK_THAT(refused("[{type: http, http: {url: 'h'}}]"), ContainsSubstring("rewards.0.http.url"));
  CHECK_THAT(refused("[{type: http, on_failure: drop, normalize: group, http: {url: 'http://h/'}}]"),
             ContainsSubstring("on_failure"));
  CHECK_THAT(refused("[{type: http, on_failure: drop, http: {url: 'http://h/'}}]",
                     {"stages=[rejection_sampling]", "rejection_sampling.sampler.reward_model_weight=0"}),
             ContainsSubstring("rewards.0.on_failure") && ContainsSubstring("rejection_sampling"));
}

}  // namespace
}  // namespace rlhf

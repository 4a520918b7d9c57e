// What the scheduling modes promise, on whole runs: streamed is serial bit for bit, one_step_off repeats and
// resumes exactly, async never trains a token that is too old.
#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "tests/catch.h"
#include "tests/train/tiny_run.h"

using namespace rlhf;
using Start = PipelineSettings::Start;

namespace {

// Groups of two, no batch statistics: the first optimizer step can begin before the batch is complete.
const std::vector<std::string> kByGroup = {
    // The reward model tells the responses of a group apart.
    "stages=[sft, reward, ppo, eval]",
    "ppo.critic_init=policy",
    "ppo.algorithm.critic_update=none",
    "ppo.algorithm.advantage.form=sequence",
    "ppo.algorithm.advantage.group.baseline=mean",
    "ppo.algorithm.advantage.whitening=none",
    "ppo.algorithm.reward.placement=last_token",
    "ppo.algorithm.kl={placement: none}",
    "ppo.algorithm.value_positions=tokens",
    "ppo.algorithm.prompts_per_step=5",
    "ppo.max_tokens_per_micro_batch=30"};

std::vector<std::string> with(std::vector<std::string> overrides, const std::vector<std::string>& more) {
  overrides.insert(overrides.end(), more.begin(), more.end());
  return overrides;
}

std::string final_policy(const TinyData& data, const std::string& run) {
  return read_text_file(data.path(run) / "checkpoints" / "ppo.final.safetensors");
}

// All metrics of the PPO stage but those of time.
std::map<std::int64_t, Metrics> ppo_metrics(const Attempt& attempt) {
  std::map<std::int64_t, Metrics> metrics;
  for (const auto& [key, values] : attempt.steps)
    if (key.first == "ppo")
      for (const auto& [name, value] : values)
        if (!measures_time(name) && std::isfinite(value)) metrics[key.second].emplace_back(name, value);
  return metrics;
}

}  // namespace

TEST_CASE("streamed gives the samples, metrics and weights of serial, bit for bit") {
  const TinyData data;
  const std::vector<std::vector<std::string>> variants = {
      kByGroup,
      with(kByGroup, {"ppo.algorithm.mini_batches=1", "ppo.algorithm.epochs=1"}),
      with(kByGroup, {"ppo.algorithm.policy.aggregation.mode=sequence_mean_token_mean"}),
      with(kByGroup,
           {"ppo.algorithm.policy.aggregation.mode=constant", "ppo.algorithm.policy.aggregation.scale=8"}),
      with(kByGroup,
           {"ppo.algorithm.policy.kl.coefficient=0.1", "model.trainable=last_layers", "model.last_layers=1"}),
      // A critic without whitening: advantages of a sample need no other.
      {"ppo.algorithm.advantage.whitening=none", "ppo.algorithm.samples_per_prompt=1"},
      with(kByGroup, {"rollout.weights=int8"}),
      with(kByGroup, {"rewards=[{type: length, max_tokens: 3, normalize: group}, {type: regex, pattern: "
                      "'[a-m]', gate: {term: length, min: 0}}]"}),
      with(kByGroup, {"rewards=[{type: length, max_tokens: 3, normalize: running}]"}),
      // Batch whitening: only scoring overlaps.
      {}};
  int number = 0;
  for (const auto& variant : variants) {
    const std::string name = "v" + std::to_string(number++);
    INFO(name);
    const Attempt serial = attempt(data.options(name, with(variant, {"threads=2"})), Start::kFresh);
    for (int repeat = 0; repeat < 3; ++repeat) {
      const std::string run = name + "s" + std::to_string(repeat);
      const Attempt streamed =
          attempt(data.options(run, with(variant, {"threads=2", "schedule.mode=streamed"})), Start::kFresh);
      CHECK((final_policy(data, run) == final_policy(data, name)));
      CHECK(files_below(data.path(run) / "samples") == files_below(data.path(name) / "samples"));
      CHECK(ppo_metrics(streamed) == ppo_metrics(serial));
      const bool packs = std::ranges::find(variant, "rollout.weights=int8") != variant.end();
      for (const auto& [step, metrics] : ppo_metrics(streamed))
        CHECK((metric(metrics, "rollout/copied_weight_bytes", -1) > 0) == packs);
    }
  }
}

TEST_CASE("one_step_off repeats bit for bit, resumes exactly, and is one version old") {
  const TinyData data;
  const auto options = [&](const std::string& name) {
    return data.options(name, with(kByGroup, {"threads=2", "schedule.mode=one_step_off"}));
  };
  const Attempt whole = attempt(options("whole"), Start::kFresh);
  attempt(options("again"), Start::kFresh);
  CHECK((final_policy(data, "again") == final_policy(data, "whole")));
  for (std::int64_t step : {1, 2, 3}) {
    const std::string name = "stop" + std::to_string(step);
    CHECK(attempt(options(name), Start::kFresh, "ppo", step).stopped);
    const Attempt second = attempt(options(name), Start::kResume);
    CHECK_FALSE(second.stopped);
    CHECK((final_policy(data, name) == final_policy(data, "whole")));
    CHECK(files_below(data.path(name) / "samples") == files_below(data.path("whole") / "samples"));
  }
  CHECK(metric(whole.steps.at({"ppo", 1}), "rollout/staleness_max", -1) == 0);
  for (std::int64_t step : {2, 3, 4}) {
    CHECK(metric(whole.steps.at({"ppo", step}), "rollout/staleness_mean", -1) == 1);
    CHECK(metric(whole.steps.at({"ppo", step}), "rollout/staleness_max", -1) == 1);
    CHECK(metric(whole.steps.at({"ppo", step}), "rollout/copied_weight_bytes", -1) > 0);
  }
  attempt(data.options("serial", kByGroup), Start::kFresh);
  CHECK((final_policy(data, "serial") != final_policy(data, "whole")));
}

TEST_CASE("async trains every batch, no token older than allowed, also with a truncated correction") {
  const TinyData data;
  for (const std::int64_t staleness : {1, 2})
    for (const bool corrected : {false, true}) {
      const std::string name = "a" + std::to_string(staleness) + (corrected ? "c" : "");
      std::vector<std::string> overrides =
          with(kByGroup, {"threads=2", "schedule.mode=async",
                          "schedule.max_staleness=" + std::to_string(staleness), "ppo.iterations=6"});
      if (corrected)
        overrides =
            with(overrides, {"ppo.algorithm.correction.level=token", "ppo.algorithm.correction.upper=2"});
      INFO(name);
      const Attempt run = attempt(data.options(name, overrides), Start::kFresh);
      double oldest = 0;
      for (std::int64_t step = 1; step <= 6; ++step) {
        const Metrics& metrics = run.steps.at({"ppo", step});
        oldest = std::max(oldest, metric(metrics, "rollout/staleness_max", 99));
        // Log-probs are computed again for the correction; otherwise the sampler's are the anchor.
        CHECK((metric(metrics, "rollout/logprob_gap_max", -1) >= 0) == corrected);
      }
      CHECK(oldest <= static_cast<double>(staleness));
      CHECK(attempt(data.options(name + "s", overrides), Start::kFresh, "ppo", 2).stopped);
      CHECK_FALSE(attempt(data.options(name + "s", overrides), Start::kResume).stopped);
    }
}

TEST_CASE("a reward that throws ends an overlapped run with the iteration in the message") {
  const TinyData data;
  class Throwing : public RewardTerm {
   public:
    std::string_view name() const override { return "throwing"; }
    double score(const ScoredSample&) const override { throw std::runtime_error("no connection"); }
  };
  for (const char* mode : {"streamed", "one_step_off", "async"}) {
    const RunOptions options =
        data.options(mode, with(kByGroup, {"threads=2", std::string("schedule.mode=") + mode}));
    Watcher watcher(nullptr);
    PipelineSettings settings;
    Pipeline pipeline(options, settings, watcher);
    pipeline.add_reward(std::make_unique<Throwing>(), {});
    CHECK_THROWS_WITH(pipeline.run(), ContainsSubstring("no connection"));
  }
}

TEST_CASE("schedule options that contradict each other are errors") {
  const TinyData data;
  CHECK_THROWS_WITH(data.options("x", {"schedule.max_staleness=2"}), ContainsSubstring("max_staleness"));
  CHECK_THROWS_WITH(data.options("x", {"schedule.mode=async", "schedule.max_staleness=0"}),
                    ContainsSubstring("max_staleness"));
  CHECK_THROWS_WITH(data.options("x", {"schedule.mode=overlapped"}), ContainsSubstring("one_step_off"));
}

TEST_CASE("what the generator computed in frozen layers trains as if the trainer had computed it") {
  const TinyData data;
  const auto overrides = with(kByGroup, {"model.trainable=last_layers", "model.last_layers=1",
                                         "ppo.algorithm.policy.kl.coefficient=0.1"});
  const auto none = attempt(data.options("none", with(overrides, {"ppo.trunk_cache=0"})), Start::kFresh);
  // Room for a part of the batch: 16 floats a token.
  for (const std::string room : {"1KiB", "1MiB"}) {
    INFO(room);
    const auto kept =
        attempt(data.options(room, with(overrides, {"ppo.trunk_cache=" + room})), Start::kFresh);
    CHECK(final_policy(data, room) == final_policy(data, "none"));
    CHECK(ppo_metrics(kept) == ppo_metrics(none));
  }
}

TEST_CASE("trace.json shows what the lanes did, each lane one thing at a time") {
  const TinyData data;
  attempt(data.options("traced", with(kByGroup, {"schedule.mode=streamed", "run.trace_iterations=2"})),
          Start::kFresh);
  const auto events = nlohmann::json::parse(read_text_file(data.path("traced") / "trace.json"));
  std::map<int, std::string> tracks;
  std::map<std::string, std::vector<std::pair<double, double>>> spans;
  std::map<std::string, double> samples;  // by task
  std::vector<std::string> stages;
  double versions = 0;
  for (const auto& event : events) {
    if (event["ph"] == "M") tracks[event["tid"]] = event["args"]["name"];
    if (event["ph"] == "C" && event["name"] == "weights version") ++versions;
    if (event["ph"] != "X") continue;
    const std::string track = tracks.at(event["tid"]);
    spans[track].emplace_back(event["ts"], event["dur"]);
    if (track == "stages") {
      stages.push_back(event["name"]);
      continue;
    }
    CHECK(event["args"]["iteration"] <= 2.0);
    samples[event["name"]] += event["args"].value("samples", 0.0);
  }
  CHECK(stages == std::vector<std::string>{"eval base", "sft", "eval sft", "reward", "ppo", "eval ppo"});
  CHECK(versions == 2);
  // Two iterations of 5 x 2 samples.
  CHECK(samples.at("generate") == 20);
  CHECK(samples.at("score") == 20);
  for (const char* lane : {"generate lane", "train lane"}) {
    auto& lane_spans = spans.at(lane);
    std::ranges::sort(lane_spans);
    for (std::size_t i = 1; i < lane_spans.size(); ++i)
      CHECK(lane_spans[i].first >= lane_spans[i - 1].first + lane_spans[i - 1].second - 0.01);
  }
}

// `rlhf train` as several processes against the same run in this process: losses, metrics and weights are
// those of one.
#include <atomic>
#include <csignal>
#include <fstream>
#include <nlohmann/json.hpp>

#include "rlhf/config/writer.h"
#include "rlhf/distributed/gloo_collective.h"
#include "tests/distributed/processes.h"
#include "tests/distributed/run_results.h"
#include "tests/reward/http_server.h"
#include "tests/train/tiny_run.h"

using namespace rlhf;
using Start = PipelineSettings::Start;
using Overrides = std::vector<std::string>;

namespace {

// Sums over ranks and over micro-batches are taken in another order than in one process: a few units in the
// last place of fp32, which Adam's division by small second moments carries on.
constexpr double kTolerance = 1e-5;

bool is_without_gloo() {
  if (!has_gloo()) WARN("skipped: built without Gloo");
  return !has_gloo();
}

bool near(double a, double b) {
  return std::abs(a - b) <= kTolerance * (1 + std::abs(b));
}

// Starts the program on options in a file of their own, without the GPUs that there may be.
std::vector<Process> start_run(const TinyData& data, RunOptions options, int ranks,
                               const Overrides& words = {}) {
  options.distributed.timeout_s = std::min(options.distributed.timeout_s, 15.0);
  const auto file = data.path(std::filesystem::path(options.run.dir).filename().string() + ".yaml");
  config::save_resolved(file, options);
  Overrides command = {"/usr/bin/env", "CUDA_VISIBLE_DEVICES=", RLHF_PROGRAM, "train", file.string()};
  command.insert(command.end(), words.begin(), words.end());
  return start_ranks(data.folder(), command, ranks);
}

void check_success(std::vector<Process>& ranks) {
  for (std::size_t r = 0; r < ranks.size(); ++r) {
    const int code = ranks[r].wait();
    INFO("rank " << r << ": " << ranks[r].err());
    CHECK(code == 0);
    // Rank 0 alone speaks.
    CHECK(ranks[r].out().empty() == (r > 0));
    if (r > 0) CHECK(ranks[r].err().empty());
  }
}

// All that the one-process run has reported, but what may differ, is in the metrics of the other.
void check_metrics(const Attempt& one, const std::filesystem::path& run,
                   const std::vector<std::string>& but = {}) {
  const auto steps = read_metrics(run);
  CHECK(steps.size() == one.steps.size());
  for (const auto& [key, metrics] : one.steps) {
    REQUIRE(steps.contains(key));
    for (const auto& [name, value] : metrics) {
      if (measures_time(name) || std::ranges::find(but, name) != but.end()) continue;
      INFO(key.first << " " << key.second << " " << name);
      REQUIRE(steps.at(key).contains(name));
      const double found = steps.at(key)[name];
      INFO(found << ", one process: " << value);
      CHECK(near(found, value));
    }
  }
}

void check_weights(const TinyData& data, const std::string& run, const std::string& one,
                   const std::vector<std::string>& stages) {
  for (const std::string& stage : stages) {
    INFO(run << ", " << stage);
    CHECK(largest_difference(final_weights(data.path(run), stage), final_weights(data.path(one), stage)) <
          kTolerance);
  }
}

// Small steps of Adam: its first ones are as large as the learning rate wherever a gradient is not exactly 0.
const Overrides kSmallSteps = {"pretrain.optimizer.learning_rate=0.001", "sft.optimizer.learning_rate=0.001",
                               "reward.optimizer.learning_rate=0.001",
                               "preference.optimizer.learning_rate=0.001",
                               "ppo.algorithm.optimizer.learning_rate=0.001"};

Overrides with(Overrides overrides, const Overrides& more) {
  overrides.insert(overrides.end(), kSmallSteps.begin(), kSmallSteps.end());
  overrides.insert(overrides.end(), more.begin(), more.end());
  return overrides;
}

// Means over micro-batches, which several processes cut otherwise; and what an engine counts.
const std::vector<std::string> kCutMetrics = {
    "policy/clip_fraction", "policy/approx_kl",    "policy/ratio_mean",        "policy/ratio_variance",
    "policy/entropy",       "value/clip_fraction", "value/explained_variance", "rollout/decode_steps"};

// Prompts and responses that the runs have written, in order.
void check_samples(const std::filesystem::path& run, const std::filesystem::path& one) {
  const auto files = files_below(run / "samples"), expected = files_below(one / "samples");
  CHECK(files.size() == expected.size());
  for (const auto& [name, text] : expected) {
    REQUIRE(files.contains(name));
    std::istringstream lines(files.at(name)), expected_lines(text);
    for (std::string line, other; std::getline(expected_lines, other);) {
      REQUIRE(std::getline(lines, line));
      const auto found = nlohmann::json::parse(line), wanted = nlohmann::json::parse(other);
      for (const char* key : {"prompt_id", "response", "finish_reason", "output_ids"})
        CHECK(found.value(key, nlohmann::json()) == wanted.value(key, nlohmann::json()));
    }
  }
}

void compare(const TinyData& data, const std::string& name, const Overrides& overrides,
             const std::vector<std::string>& stages, const std::vector<int>& sizes,
             const std::vector<std::string>& but = {}) {
  const Attempt one = attempt(data.options(name, overrides), Start::kFresh);
  for (const int ranks : sizes) {
    const std::string run = name + "_" + std::to_string(ranks);
    INFO(run);
    auto processes = start_run(data, data.options(run, overrides), ranks);
    check_success(processes);
    check_metrics(one, data.path(run), but);
    check_weights(data, run, name, stages);
    check_samples(data.path(run), data.path(name));
  }
}

}  // namespace

TEST_CASE("supervised and preference stages of two and four processes are those of one") {
  if (is_without_gloo()) return;
  const Overrides sharding = {"distributed.sharding=" + std::string(GENERATE("zero1", "zero2"))};
  INFO(sharding[0]);
  const TinyData data;
  const Overrides stages = {"stages=[pretrain, sft, reward, preference, eval]", "preference.max_steps=3",
                            "preference.pairs_per_step=3", "preference.max_tokens_per_micro_batch=60"};
  compare(data, "dpo", with(stages, sharding), {"pretrain", "sft", "reward", "preference"}, {2, 4});
}

TEST_CASE("gradients in slices are those of one buffer, bit for bit while a rank has one micro-batch") {
  if (is_without_gloo()) return;
  const TinyData data;
  const auto weights_of = [&](const std::string& name, const std::string& sharding, const char* tokens) {
    auto processes = start_run(data,
                               data.options(name, with({"stages=[sft]", "sft.examples_per_step=5",
                                                        concat("sft.max_tokens_per_micro_batch=", tokens),
                                                        "distributed.sharding=" + sharding},
                                                       {})),
                               3);
    check_success(processes);
    return final_weights(data.path(name), "sft");
  };
  CHECK((weights_of("slices", "zero2", "1000") == weights_of("whole", "zero1", "1000")));
  // Else micro-batches are added up behind the ranks, not before them: rounding, as in kTolerance.
  CHECK(largest_difference(weights_of("slices_cut", "zero2", "20"), weights_of("whole_cut", "zero1", "20")) <
        1e-6);
}

TEST_CASE("losses over a whole batch, unpaired ones, ratings and adapters are those of one process") {
  if (is_without_gloo()) return;
  const Overrides sharding = {"distributed.sharding=" + std::string(GENERATE("zero1", "zero2"))};
  INFO(sharding[0]);
  const TinyData data;
  const Overrides preference = {"stages=[preference]", "preference.max_steps=3",
                                "preference.pairs_per_step=3", "preference.max_tokens_per_micro_batch=60"};
  // AOT sorts the differences of all pairs; KTO has a reference point of all responses.
  compare(data, "aot", with(preference, {"preference.loss.terms=[{kind: aot}, {kind: sft}]"}), {"preference"},
          {2});
  compare(data, "kto", with(preference, {"preference.unpaired.beta=0.2"}), {"preference"}, {2});
  data.folder().write("ratings.jsonl", R"({"prompt": "a: ", "response": "buy", "scores": [1, 0.5]}
{"prompt": "b: ", "response": "sell it all", "scores": [-1, 2]}
{"prompt": "c: ", "response": "hold", "scores": [0.3, -0.5]}
)");
  compare(data, "ratings",
          with({"stages=[reward]", "reward.target=scores",
                "data.ratings_file=" + data.path("ratings.jsonl").string(),
                "reward.objectives=[{name: up}, {name: size}]", "ppo.critic_init=policy"},
               sharding),
          {"reward"}, {2});
  compare(data, "lora", with({"stages=[sft]", "model.trainable=lora", "model.lora_rank=2"}, sharding),
          {"sft"}, {3});
  compare(data, "last",
          with({"stages=[sft]", "model.trainable=last_layers", "model.last_layers=1"}, sharding), {"sft"},
          {2});
  compare(data, "again", with({"stages=[sft]", "memory.recompute=layers"}, sharding), {"sft"}, {2});
  // More processes than items in a step.
  compare(data, "few", with({"stages=[sft]", "sft.examples_per_step=2"}, sharding), {"sft"}, {4});
}

// What a run is begun and resumed with.
using Shardings = std::pair<std::string, std::string>;

TEST_CASE("a run of two processes that is stopped goes on with one and with four") {
  if (is_without_gloo()) return;
  const TinyData data;
  const auto [before, after] = GENERATE(Shardings{"zero1", "zero1"}, Shardings{"zero1", "zero2"},
                                        Shardings{"zero2", "zero2"}, Shardings{"zero2", "zero1"});
  INFO(before << ", then " << after);
  const auto options = [&](const std::string& name, const std::string& sharding) {
    return data.options(name, with({"stages=[sft, eval]", "sft.max_steps=60", "sft.examples_per_step=5",
                                    "distributed.sharding=" + sharding},
                                   {}));
  };
  attempt(options("whole", after), Start::kFresh);
  auto processes = start_run(data, options("two", before), 2);
  CHECK([&] {
    for (int i = 0; i < 4000; ++i) {
      std::error_code code;
      if (std::filesystem::file_size(data.path("two") / "metrics.jsonl", code) > 400 && !code) return true;
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    return false;
  }());
  // One of them is told, both stop after the same step.
  processes[1].signal(SIGTERM);
  for (Process& process : processes) CHECK(process.wait() == 1);
  CHECK_THAT(processes[0].err(), ContainsSubstring("stopped; continue with"));
  const auto done = read_metrics(data.path("two")).size();
  INFO(done << " steps");
  CHECK(done < 60);
  // Its checkpoint has the moments of all elements.
  const auto manifest = nlohmann::json::parse(read_text_file(data.path("two") / "checkpoints" / "sft.json"));
  const auto file =
      WeightFile::open(data.path("two") / "checkpoints" / manifest.at("tensors").get<std::string>());
  const auto all = static_cast<std::int64_t>(final_weights(data.path("whole"), "sft").size());
  for (const char* name : {"policy.weights", "policy.first_moment", "policy.second_moment"})
    CHECK(file->find(name)->num_elements() == all);

  for (const int ranks : {1, 4}) {
    const std::string name = "on" + std::to_string(ranks);
    std::filesystem::copy(data.path("two"), data.path(name), std::filesystem::copy_options::recursive);
    auto resumed = start_run(data, options(name, after), ranks, {"--resume"});
    check_success(resumed);
    CHECK(read_metrics(data.path(name)).size() == 62);
    check_weights(data, name, "whole", {"sft"});
  }
}

TEST_CASE("a rank that is killed in training ends the others, and the run can be resumed") {
  if (is_without_gloo()) return;
  const std::string sharding = GENERATE("zero1", "zero2");
  const TinyData data;
  const auto options =
      data.options("killed", with({"stages=[sft]", "sft.max_steps=100000", "distributed.timeout_s=4",
                                   "run.checkpoint_every=3", "distributed.sharding=" + sharding},
                                  {}));
  auto processes = start_run(data, options, 3);
  const auto manifest = data.path("killed") / "checkpoints" / "sft.json";
  for (int i = 0; i < 4000 && !std::filesystem::exists(manifest); ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  processes[2].signal(SIGKILL);
  for (int r = 0; r < 2; ++r) {
    CHECK(processes[static_cast<std::size_t>(r)].wait(30) == 1);
    CHECK_THAT(processes[static_cast<std::size_t>(r)].err(), ContainsSubstring("of 3 lost rank"));
  }
  CHECK(nlohmann::json::parse(read_text_file(manifest)).at("steps").get<int>() % 3 == 0);
}

TEST_CASE("an error of one rank ends the run of all") {
  if (is_without_gloo()) return;
  const TinyData data;
  const int port = free_port();
  const std::string different = GENERATE("sft.max_steps=9", "distributed.sharding=zero2");
  const auto start = [&](const std::string& name, const Overrides& overrides, int rank) {
    const auto file = data.path(name + ".yaml");
    config::save_resolved(file, data.options("same", overrides));
    return Process(data.folder(), name, {RLHF_PROGRAM, "train", file.string()},
                   rank_variables(rank, 2, port));
  };
  std::vector<Process> processes;
  processes.push_back(start("first", {"stages=[sft]"}, 0));
  processes.push_back(start("second", {"stages=[sft]", different}, 1));
  for (Process& process : processes) {
    CHECK(process.wait() == 1);
    CHECK_THAT(process.err(), ContainsSubstring("all ranks must run the same program on the same options"));
  }
}

TEST_CASE("ppo of several processes samples what one samples and learns the same") {
  if (is_without_gloo()) return;
  const Overrides sharding = {"distributed.sharding=" + std::string(GENERATE("zero1", "zero2"))};
  INFO(sharding[0]);
  const TinyData data;
  const Overrides short_run = {"stages=[reward, ppo, eval]", "ppo.iterations=3", "ppo.samples_to_log=100"};
  compare(data, "ppo", with(short_run, sharding), {"reward", "ppo"}, {2, 4}, kCutMetrics);
  compare(data, "remax",
          with(with(short_run, sharding),
               {"ppo.algorithm.advantage.greedy_baseline=true", "ppo.algorithm.advantage.form=sequence",
                "ppo.algorithm.critic_update=none", "ppo.critic_init=policy"}),
          {"ppo"}, {2}, kCutMetrics);
  // Groups whose responses score alike are asked again, by the rank that has them.
  compare(data, "again",
          with(with(short_run, sharding),
               {"ppo.algorithm.dynamic_sampling.enabled=true", "ppo.algorithm.dynamic_sampling.max_rounds=3",
                "ppo.algorithm.advantage.form=sequence", "ppo.algorithm.advantage.group.baseline=mean",
                "ppo.algorithm.critic_update=none", "ppo.critic_init=policy"}),
          {"ppo"}, {2}, kCutMetrics);
}

TEST_CASE("ppo with gradients in slices is that of one process, and holds what is planned") {
  if (is_without_gloo()) return;
  const TinyData data;
  compare(data, "ppo",
          with({"stages=[reward, ppo, eval]", "ppo.iterations=3", "ppo.samples_to_log=100",
                "ppo.algorithm.critic_update=separate", "ppo.algorithm.critic_optimizer.learning_rate=0.001"},
               {"distributed.sharding=zero2"}),
          {"reward", "ppo"}, {2, 4}, kCutMetrics);
  // A rank's slice, the larger layer and what is in none: 4 bytes for each of so many numbers.
  constexpr std::size_t kLayer = 32 * 16 + 16 * 16 + 2 * 16 + 3 * 16 * 24;
  const std::size_t vocabulary = (final_weights(data.path("ppo"), "ppo").size() - 2 * kLayer - 16) / 16;
  for (const std::size_t ranks : {2, 4}) {
    const auto metrics = read_metrics(data.path("ppo_" + std::to_string(ranks))).at({"ppo", 3});
    for (const auto& [name, rest] :
         {std::pair{"policy", vocabulary * 16 + 16}, std::pair{"critic", vocabulary * 16 + 32}}) {
      INFO(name << " on " << ranks);
      const std::size_t slice = (2 * kLayer + rest) / ranks / 64 * 64;
      CHECK(metrics.at(concat("memory/peak_bytes/", name, " gradient")).get<std::size_t>() ==
            4 * (slice + kLayer + rest));
    }
  }
}

TEST_CASE("ppo that is stopped goes on with another number of processes") {
  if (is_without_gloo()) return;
  const TinyData data;
  const auto options = [&](const std::string& name) {
    return data.options(
        name, with({"stages=[reward, ppo]", "run.checkpoint_every=2", "ppo.algorithm.critic_update=separate",
                    "ppo.algorithm.critic_optimizer.learning_rate=0.001"},
                   {}));
  };
  CHECK(attempt(options("ppo"), Start::kFresh, "ppo", 2).stopped);
  std::filesystem::copy(data.path("ppo"), data.path("on3"), std::filesystem::copy_options::recursive);
  attempt(options("ppo"), Start::kResume);
  auto resumed = start_run(data, options("on3"), 3, {"--resume"});
  check_success(resumed);
  check_weights(data, "on3", "ppo", {"ppo"});
}

TEST_CASE("stages that sample and then learn are those of one process") {
  if (is_without_gloo()) return;
  const Overrides sharding = {"distributed.sharding=" + std::string(GENERATE("zero1", "zero2"))};
  INFO(sharding[0]);
  const TinyData data;
  compare(
      data, "sampled",
      with({"stages=[reward, rejection_sampling, online_preference]", "rejection_sampling.iterations=1",
            "rejection_sampling.samples_per_prompt=3", "rejection_sampling.reward_model_weight=0.5",
            "rejection_sampling.sft.max_steps=2", "rejection_sampling.sft.examples_per_step=2",
            "rejection_sampling.sft.optimizer.learning_rate=0.001", "online_preference.iterations=2",
            "online_preference.prompts_per_step=3", "online_preference.samples_per_prompt=3",
            "online_preference.reward_model_weight=0.5", "online_preference.optimizer.learning_rate=0.001"},
           sharding),
      {"rejection_sampling", "online_preference"}, {2});
}

TEST_CASE("a reward server is asked once for each response, whatever the number of processes") {
  if (is_without_gloo()) return;
  const TinyData data;
  std::atomic<int> asked{0};
  const RewardServer server([&](const httplib::Request& request, httplib::Response& response) {
    ++asked;
    const auto json = nlohmann::json::parse(request.body);
    const auto prompt = json["prompts"][0].get<std::string>();
    if (prompt == "now gold: " || prompt == "now oil: ") {
      response.status = 400;
      return;
    }
    const double reward = static_cast<double>(json["responses"][0].get<std::string>().size() % 3);
    response.set_content(nlohmann::json{{"rewards", {reward}}}.dump(), "application/json");
  });
  const std::string reward = "type: http, name: remote, http: {url: '" + server.url() + "', attempts: 1}";
  const Overrides ppo =
      with({"stages=[ppo]", "ppo.iterations=2", "ppo.reward_model_weight=0", "ppo.critic_init=policy",
            "ppo.algorithm.samples_per_prompt=3", "rewards=[{" + reward + ", on_failure: drop}]"},
           {});
  compare(data, "ppo", ppo, {"ppo"}, {2}, kCutMetrics);
  CHECK(asked == 2 * 2 * 9);
  asked = 0;
  const Overrides best =
      with({"stages=[rejection_sampling, eval]", "rejection_sampling.iterations=1", "eval.sampled_draws=0",
            "rejection_sampling.samples_per_prompt=3", "rejection_sampling.reward_model_weight=0",
            "rejection_sampling.sft.max_steps=2", "rejection_sampling.sft.optimizer.learning_rate=0.001",
            "rewards=[{" + reward + ", on_failure: score, failure_score: -1}]"},
           {});
  compare(data, "best", best, {"rejection_sampling"}, {2});
  // Three responses to each of five prompts, and the evaluations of two models.
  CHECK(asked == 2 * (5 * 3 + 2 * 5));
}

TEST_CASE("several processes without GPUs run on CPUs, and say why") {
  if (is_without_gloo()) return;
  const TinyData data;
  auto processes = start_run(data, data.options("cuda", {"stages=[sft]"}), 2, {"--set", "device=cuda"});
  for (Process& process : processes) {
    CHECK(process.wait() == 2);
    CHECK_THAT(process.err(), ContainsSubstring("device: no GPU can be used"));
  }
  auto automatic = start_run(data, data.options("auto", {"stages=[sft]", "device=auto"}), 2);
  check_success(automatic);
  CHECK_THAT(automatic[0].err(), ContainsSubstring("device: cpu (rank 0: "));
}

TEST_CASE("several processes refuse modes that overlap") {
  if (is_without_gloo()) return;
  const TinyData data;
  auto processes = start_run(data, data.options("streamed", {"schedule.mode=streamed"}), 2);
  for (Process& process : processes) {
    CHECK(process.wait() > 0);
    CHECK_THAT(process.err(),
               ContainsSubstring("schedule.mode: several processes (2 here) train with mode serial only"));
  }
}

TEST_CASE("who divides gradients of a model of few layers is told that it costs memory") {
  if (is_without_gloo()) return;
  const TinyData data;
  const auto said = [&](const std::string& name, const std::string& layers) {
    auto processes = start_run(
        data,
        data.options(name, {"stages=[sft]", "distributed.sharding=zero2", "model.new.layers=" + layers}), 2);
    check_success(processes);
    return processes[0].err();
  };
  // Of 2 layers a rank holds a slice of half and a buffer of one, beside that of the embedding.
  CHECK_THAT(said("few", "2"), ContainsSubstring("distributed.sharding: zero2 needs 8 KiB more than zero1"));
  CHECK_THAT(said("many", "9"), !ContainsSubstring("than zero1"));
}

TEST_CASE("an unknown sharding is refused with the values that there are") {
  const TinyData data;
  CHECK_THROWS_WITH(data.options("zero3", {"distributed.sharding=zero3"}),
                    ContainsSubstring("distributed.sharding") && ContainsSubstring("zero3") &&
                        ContainsSubstring("zero1") && ContainsSubstring("zero2"));
}

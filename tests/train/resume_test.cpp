// A run that is stopped anywhere and resumed is the run that was not stopped, bit for bit.
#include <nlohmann/json.hpp>
#include <sstream>

#include "tests/catch.h"
#include "tests/train/tiny_run.h"

using namespace rlhf;
using Start = PipelineSettings::Start;

namespace {

using Stages = std::vector<std::string>;
const Stages kStages = {"pretrain", "sft", "reward", "ppo"};

// metrics.jsonl as one line per step, without what measures time.
std::vector<std::string> metric_lines(const std::filesystem::path& run) {
  std::vector<std::string> lines;
  std::istringstream in(read_text_file(run / "metrics.jsonl"));
  for (std::string line; std::getline(in, line);) {
    const auto object = nlohmann::ordered_json::parse(line);
    auto kept = nlohmann::ordered_json::object();
    for (const auto& [name, value] : object.items())
      if (!measures_time(name)) kept[name] = value;
    lines.push_back(kept.dump());
  }
  return lines;
}

std::string summary_without_times(const RunReport& report) {
  auto json = nlohmann::json::parse(to_summary_json(report));
  for (const char* key : {"timings_s", "peak_memory_bytes"}) json.erase(key);
  return json.dump(1);
}

void check_same_run(const TinyData& data, const std::string& name, const RunReport& report,
                    const std::string& reference_name, const RunReport& reference,
                    const Stages& stages = kStages) {
  const auto run = data.path(name), expected = data.path(reference_name);
  const auto checkpoints = files_below(run / "checkpoints");
  CHECK(checkpoints.size() == stages.size());
  for (const std::string& stage : stages) {
    INFO(name << ", weights of " << stage);
    REQUIRE(checkpoints.contains(stage + ".final.safetensors"));
    CHECK(checkpoints.at(stage + ".final.safetensors") ==
          read_text_file(expected / "checkpoints" / (stage + ".final.safetensors")));
  }
  INFO(name);
  CHECK(files_below(run / "samples") == files_below(expected / "samples"));
  CHECK(metric_lines(run) == metric_lines(expected));
  CHECK(summary_without_times(report) == summary_without_times(reference));
}

}  // namespace

TEST_CASE("a run stopped in any stage and resumed equals the uninterrupted run") {
  const TinyData data;
  const Attempt whole = attempt(data.options("whole"), Start::kFresh);
  REQUIRE_FALSE(whole.stopped);
  REQUIRE(whole.steps.size() == 3 + 4 + 3 + 4 + 4);  // steps of the stages, and four evaluations
  // The run does something worth comparing.
  CHECK(whole.steps.at({"sft", 4}) != whole.steps.at({"sft", 1}));

  struct Stop {
    std::string stage;
    std::int64_t step;
  };
  for (const Stop& stop : {Stop{"pretrain", 1}, Stop{"pretrain", 2}, Stop{"sft", 2}, Stop{"reward", 1},
                           Stop{"ppo", 1}, Stop{"ppo", 3}}) {
    const std::string name = stop.stage + std::to_string(stop.step);
    const Attempt first = attempt(data.options(name), Start::kFresh, stop.stage, stop.step);
    CHECK(first.stopped);
    CHECK(first.steps.rbegin()->first.second >= 1);
    CHECK(std::filesystem::exists(data.path(name) / "checkpoints" / (stop.stage + ".json")));
    CHECK_FALSE(std::filesystem::exists(data.path(name) / "summary.json"));
    const Attempt second = attempt(data.options(name), Start::kResume);
    CHECK_FALSE(second.stopped);
    check_same_run(data, name, second.report, "whole", whole.report);
    // No step was done twice.
    for (const auto& [step, metrics] : second.steps) CHECK_FALSE(first.steps.contains(step));
  }
}

TEST_CASE("a run stopped after every step equals the uninterrupted run") {
  const TinyData data;
  const Attempt whole = attempt(data.options("whole"), Start::kFresh);
  Attempt last = attempt(data.options("pieces"), Start::kFresh, "*");
  int attempts = 1;
  for (; last.stopped && attempts < 30; ++attempts)
    last = attempt(data.options("pieces"), Start::kResume, "*");
  REQUIRE_FALSE(last.stopped);
  CHECK(attempts > 8);
  check_same_run(data, "pieces", last.report, "whole", whole.report);
}

TEST_CASE("a killed run goes on from its last checkpoint") {
  const TinyData data;
  const Attempt whole = attempt(data.options("whole"), Start::kFresh);
  // Killed at any step: an exception from the observer leaves the process without a word to the pipeline.
  struct Killed {};
  class Killer : public Watcher {
   public:
    Killer(RunObserver* inner, std::string stage, std::int64_t step)
        : Watcher(inner), stage_(std::move(stage)), step_(step) {}
    void step(const std::string& stage, std::int64_t step, std::int64_t count,
              const Metrics& metrics) override {
      Watcher::step(stage, step, count, metrics);
      if (stage == stage_ && step == step_) throw Killed();
    }

   private:
    std::string stage_;
    std::int64_t step_;
  };
  for (const std::string stage : {"sft", "reward", "ppo"}) {
    const auto options = data.options(stage, {"run.checkpoint_every=2"});
    try {
      RunDirectory directory(options, Start::kFresh, {}, [](std::string_view) {});
      Killer killer(&directory, stage, 3);
      PipelineSettings settings;
      settings.directory = directory.path();
      settings.fingerprint = directory.fingerprint();
      Pipeline(options, settings, killer).run();
      FAIL("was not killed");
    } catch (const Killed&) {
    }
    const Attempt second = attempt(options, Start::kResume);
    CHECK_FALSE(second.stopped);
    CHECK(second.steps.contains({stage, 3}));
    CHECK_FALSE(second.steps.contains({stage, 2}));
    check_same_run(data, stage, second.report, "whole", whole.report);
  }
}

TEST_CASE("the number of threads changes nothing, also in the middle of a run") {
  const TinyData data;
  // Wide enough that the kernels split their work.
  const std::vector<std::string> wide = {"model.new.hidden_size=48", "model.new.intermediate_size=160"};
  const auto with_threads = [&](const std::string& name, int threads) {
    auto overrides = wide;
    overrides.push_back("threads=" + std::to_string(threads));
    return data.options(name, overrides);
  };
  const Attempt one = attempt(with_threads("one", 1), Start::kFresh);
  const Attempt two = attempt(with_threads("two", 2), Start::kFresh);
  check_same_run(data, "two", two.report, "one", one.report);
  CHECK(attempt(with_threads("mixed", 2), Start::kFresh, "ppo", 2).stopped);
  const Attempt mixed = attempt(with_threads("mixed", 3), Start::kResume);
  check_same_run(data, "mixed", mixed.report, "one", one.report);
}

TEST_CASE("resuming equals the uninterrupted run for other kinds of trained weights and algorithms") {
  const TinyData data;
  const std::vector<std::vector<std::string>> variants = {
      {"model.trainable=last_layers", "model.last_layers=1"},
      {"model.trainable=lora", "model.lora_rank=2"},
      {"ppo.algorithm.critic_update=separate", "ppo.algorithm.critic_optimizer.learning_rate=0.01",
       "ppo.critic_init=policy", "ppo.old_log_probs=recompute"},
      {"ppo.algorithm.advantage.form=sequence", "ppo.algorithm.advantage.group.baseline=mean",
       "ppo.algorithm.critic_update=none", "ppo.critic_init=policy", "rollout.sampling.top_p=0.9"},
      {"ppo.algorithm.reward.normalization=running"},
      {"ppo.algorithm.reward.normalization=reference", "memory.recompute=layers"},
      {"rewards=[{type: length, max_tokens: 3, normalize: running}, {type: regex, pattern: '[a-m]', "
       "normalize: group, schedule: [{iteration: 1, factor: 1}, {iteration: 4, factor: 0}]}]"},
      {"rollout.weights=int8"},
      {"rollout.weights=bf16", "model.trainable=lora", "model.lora_rank=2"},
  };
  int number = 0;
  for (const auto& variant : variants) {
    const std::string name = "variant" + std::to_string(number++);
    INFO(name);
    const Attempt whole = attempt(data.options(name, variant), Start::kFresh);
    CHECK(attempt(data.options(name + "s", variant), Start::kFresh, "sft", 1).stopped);
    CHECK(attempt(data.options(name + "s", variant), Start::kResume, "ppo", 2).stopped);
    const Attempt last = attempt(data.options(name + "s", variant), Start::kResume);
    CHECK_FALSE(last.stopped);
    check_same_run(data, name + "s", last.report, name, whole.report);
  }
}

TEST_CASE("resuming equals the uninterrupted run on the built-in tasks") {
  const TinyData data;
  struct Task {
    std::string name;
    std::vector<std::string> overrides;
  };
  const std::vector<Task> tasks = {
      {"walks",
       {"data.source=random_walks", "data.sft_cases=20", "model.new.vocabulary=letters", "rewards=[]",
        "stages=[sft, ppo, eval]", "ppo.reward_model_weight=0", "ppo.critic_init=policy"}},
      {"desk",
       {"data.source=finance_desk", "data.kinds=[gate, calculation]", "data.sft_cases=4", "data.pair_cases=3",
        "data.prompt_cases=4", "data.eval_cases=3", "model.new.max_positions=700", "rewards=[]",
        "sft.max_tokens_per_micro_batch=1000", "stages=[sft, reward, ppo, eval]", "ppo.iterations=2"}}};
  for (const Task& task : tasks) {
    INFO(task.name);
    const Attempt whole = attempt(data.options(task.name, task.overrides), Start::kFresh);
    const std::string name = task.name + "s";
    CHECK(attempt(data.options(name, task.overrides), Start::kFresh, "ppo", 1).stopped);
    const Attempt last = attempt(data.options(name, task.overrides), Start::kResume);
    CHECK_FALSE(last.stopped);
    CHECK(read_text_file(data.path(name) / "checkpoints" / "ppo.final.safetensors") ==
          read_text_file(data.path(task.name) / "checkpoints" / "ppo.final.safetensors"));
    CHECK(files_below(data.path(name) / "samples") == files_below(data.path(task.name) / "samples"));
    CHECK(summary_without_times(last.report) == summary_without_times(whole.report));
  }
}

TEST_CASE("preference learning stopped anywhere and resumed equals the uninterrupted run") {
  const TinyData data;
  const Stages stages = {"sft", "preference", "ppo"};
  const std::vector<std::vector<std::string>> variants = {
      {},
      {"model.trainable=lora", "model.lora_rank=2", "preference.loss.terms=[{kind: orpo}, {kind: sft}]"},
      {"preference.unpaired.beta=0.2"}};
  for (std::size_t v = 0; v < variants.size(); ++v) {
    std::vector<std::string> overrides = {"stages=[sft, preference, ppo, eval]",
                                          "preference.max_steps=4",
                                          "preference.pairs_per_step=3",
                                          "preference.max_tokens_per_micro_batch=40",
                                          "preference.optimizer.learning_rate=0.01",
                                          "ppo.reward_model_weight=0",
                                          "ppo.critic_init=policy"};
    overrides.insert(overrides.end(), variants[v].begin(), variants[v].end());
    const std::string whole_name = "whole" + std::to_string(v);
    const Attempt whole = attempt(data.options(whole_name, overrides), Start::kFresh);
    CHECK(whole.steps.at({"preference", 4}) != whole.steps.at({"preference", 1}));
    // Stopped in ppo, the held-out pairs are judged again: their reference is the model after sft.
    for (const auto& [stage, step] : std::vector<std::pair<std::string, std::int64_t>>{
             {"preference", 1}, {"preference", 3}, {"ppo", 2}}) {
      const std::string name = stage + std::to_string(step) + std::to_string(v);
      CHECK(attempt(data.options(name, overrides), Start::kFresh, stage, step).stopped);
      const Attempt second = attempt(data.options(name, overrides), Start::kResume);
      CHECK_FALSE(second.stopped);
      check_same_run(data, name, second.report, whole_name, whole.report, stages);
    }
  }
}

TEST_CASE("learning from sampled responses stopped anywhere and resumed equals the uninterrupted run") {
  const TinyData data;
  const Stages stages = {"reward", "rejection_sampling", "online_preference"};
  const std::vector<std::string> overrides = {"stages=[reward, rejection_sampling, online_preference, eval]",
                                              "rejection_sampling.iterations=2",
                                              "rejection_sampling.samples_per_prompt=3",
                                              "rejection_sampling.reward_model_weight=0.5",
                                              "rejection_sampling.sft.max_steps=3",
                                              "rejection_sampling.sft.examples_per_step=2",
                                              "rejection_sampling.sft.optimizer.learning_rate=0.01",
                                              "online_preference.iterations=3",
                                              "online_preference.prompts_per_step=3",
                                              "online_preference.samples_per_prompt=3",
                                              "online_preference.reward_model_weight=0.5",
                                              "online_preference.optimizer.learning_rate=0.01"};
  const Attempt whole = attempt(data.options("whole", overrides), Start::kFresh);
  for (const auto& [stage, step] :
       std::vector<std::pair<std::string, std::int64_t>>{{"rejection_sampling.1", 2},
                                                         {"rejection_sampling.1", 3},
                                                         {"rejection_sampling", 1},
                                                         {"rejection_sampling.2", 1},
                                                         {"online_preference", 1},
                                                         {"online_preference", 2}}) {
    const std::string name = stage + "_" + std::to_string(step);
    CHECK(attempt(data.options(name, overrides), Start::kFresh, stage, step).stopped);
    const Attempt second = attempt(data.options(name, overrides), Start::kResume);
    CHECK_FALSE(second.stopped);
    check_same_run(data, name, second.report, "whole", whole.report, stages);
  }
}

// Whole runs on an accelerator.
#include "rlhf/train/build_task.h"
#include "rlhf/train/memory_plan.h"
#include "tests/device/accelerators.h"
#include "tests/train/tiny_run.h"

using namespace rlhf;
using Start = PipelineSettings::Start;

namespace {

// Small: the emulator runs a kernel's threads one by one.
std::vector<std::string> small(std::vector<std::string> overrides = {}) {
  const std::vector<std::string> sizes = {"stages=[sft, ppo]",
                                          "sft.max_steps=3",
                                          "rollout.max_new_tokens=4",
                                          "ppo.iterations=2",
                                          "ppo.critic_init=policy",
                                          "ppo.reward_model_weight=0",
                                          "ppo.algorithm.prompts_per_step=2",
                                          "ppo.algorithm.epochs=1",
                                          "ppo.algorithm.mini_batches=1"};
  overrides.insert(overrides.end(), sizes.begin(), sizes.end());
  return overrides;
}

Attempt attempt_on(const Accelerator& accelerator, const RunOptions& options, Start start,
                   const std::string& stop_stage = "", std::int64_t stop_step = 0) {
  return attempt(options, start, stop_stage, stop_step, &accelerator);
}

// The least budget of a run on the emulator.
std::uint64_t least_budget(const RunOptions& options) {
  const LanguageModel policy = load_policy(options);
  const TaskData task = build_task(options, policy);
  PlanSetting setting;
  setting.model = policy.config();
  setting.longest_prompt = std::max(longest_prompt(task.train_prompts), longest_prompt(task.eval_prompts));
  setting.machine_bytes = std::uint64_t{1} << 30;
  setting.sizes = NumberSizes::bf16();
  return plan_memory(options, setting).minimum_bytes();
}

std::string final_policy(const TinyData& data, const std::string& run) {
  return read_text_file(data.path(run) / "checkpoints" / "ppo.final.safetensors");
}

}  // namespace

TEST_CASE("a run on an accelerator learns as on the CPU, and goes on exactly where it was stopped",
          "[device]") {
  const TinyData data;
  const Attempt on_host = attempt(data.options("host", small()), Start::kFresh);
  on_every_accelerator([&](const Accelerator& accelerator) {
    INFO(accelerator.name);
    const std::string name = accelerator.name;
    const Attempt whole = attempt_on(accelerator, data.options(name, small()), Start::kFresh);
    REQUIRE(whole.steps.size() == on_host.steps.size());
    for (const auto& [key, metrics] : whole.steps) {
      if (key.first == "ppo" || key.first.starts_with("eval")) continue;  // other samples are drawn
      INFO(key.first << " " << key.second);
      const double expected = metric(on_host.steps.at(key), "loss", -1);
      CHECK(std::abs(metric(metrics, "loss", -2) - expected) < 0.03 * (1 + std::abs(expected)));
    }
    const Metrics& last = whole.steps.at({"ppo", 2});
    CHECK(metric(last, "optimizer/skipped_steps", 0) == 0);
    CHECK(std::isfinite(metric(last, "loss/policy", std::nan(""))));
    for (const auto& [stage, step] : {std::pair<std::string, std::int64_t>{"sft", 2}, {"ppo", 1}}) {
      const std::string again = name + "-" + stage;
      REQUIRE(attempt_on(accelerator, data.options(again, small()), Start::kFresh, stage, step).stopped);
      REQUIRE_FALSE(attempt_on(accelerator, data.options(again, small()), Start::kResume).stopped);
      CHECK((final_policy(data, again) == final_policy(data, name)));
    }
  });
}

TEST_CASE("every scheduling mode and a small budget run on an accelerator", "[device]") {
  const TinyData data;
  on_every_accelerator([&](const Accelerator& accelerator) {
    INFO(accelerator.name);
    const auto run = [&](const std::string& name, const std::vector<std::string>& overrides) {
      REQUIRE_FALSE(attempt_on(accelerator, data.options(name, small(overrides)), Start::kFresh).stopped);
      return final_policy(data, name);
    };
    const std::string serial = run("serial", {});
    CHECK((run("streamed", {"schedule.mode=streamed"}) == serial));
    CHECK((run("trunk", {"model.trainable=last_layers", "model.last_layers=1"}) != serial));
    run("async", {"schedule.mode=async", "schedule.max_staleness=2"});
    const std::string late = run("late", {"schedule.mode=one_step_off"});
    CHECK((run("later", {"schedule.mode=one_step_off"}) == late));
    CHECK((run("tight", {"memory.budget=1MiB"}) == serial));
    for (const std::string what : {"optimizer", "frozen", "all"})
      CHECK((run(what, {"memory.offload=" + what}) == serial));
  });
}

// On the emulator, where each queue's work runs as late as it may.
TEST_CASE("lanes with a queue each compute what they compute in one", "[device]") {
  if (!wants_device("emulated")) return;
  const TinyData data;
  // What a step changes is not read on the host: no second optimizer, no hashes, no checkpoints. All rewards
  // are equal; the entropy bonus changes the weights.
  const std::vector<std::string> overrides = {"stages=[ppo]",
                                              "ppo.iterations=3",
                                              "run.record_hashes=false",
                                              "ppo.algorithm.advantage.form=sequence",
                                              "ppo.algorithm.critic_update=none",
                                              "ppo.algorithm.policy.entropy_coefficient=1"};
  const std::vector<std::string> large_cache = {"rollout.max_sequences=8", "rollout.max_new_tokens=12",
                                                "ppo.algorithm.prompts_per_step=4",
                                                "ppo.max_tokens_per_micro_batch=24"};
  double reclaims = 0;
  for (const std::string mode : {"streamed", "one_step_off"})
    for (const bool tight : {false, true}) {
      INFO(mode << (tight ? " in little memory" : ""));
      const auto run = [&](const std::string& queues, DeviceMemory& memory) {
        std::vector<std::string> all = small({"schedule.mode=" + mode});
        all.insert(all.end(), overrides.begin(), overrides.end());
        if (tight) all.insert(all.end(), large_cache.begin(), large_cache.end());
        const std::string name = concat(mode, tight, queues);
        RunOptions options = data.options(name, all);
        if (tight) options.memory.budget = {least_budget(options), {}};
        const Attempt done = attempt_on(emulated_accelerator(memory), options, Start::kFresh);
        REQUIRE_FALSE(done.stopped);
        for (const auto& [key, metrics] : done.steps) reclaims += metric(metrics, "memory/cache_reclaims", 0);
        return final_policy(data, name);
      };
      const auto in_queues = [&](const std::string& name, FurtherQueues further) {
        LooseQueue memory(std::make_shared<GuardedSpace>(std::size_t{1} << 30), further);
        return run(name, memory);
      };
      const std::string expected = in_queues("one", FurtherQueues::kThisOne);
      CHECK((in_queues("late", FurtherQueues::kLate) == expected));
    }
  CHECK(reclaims > 0);
}

TEST_CASE("a device never holds more than the budget", "[device]") {
  if (!wants_device("emulated")) return;
  const TinyData data;
  const std::vector<std::vector<std::string>> cases = {
      {},
      {"ppo.critic_init=policy"},
      {"schedule.mode=one_step_off"},
      {"memory.offload=all"},
      {"model.trainable=last_layers", "model.last_layers=1"},
      {"stages=[sft, reward, ppo]", "ppo.critic_init=reward", "ppo.reward_model_weight=1"},
  };
  for (std::size_t i = 0; i < cases.size(); ++i) {
    INFO("case " << i);
    std::vector<std::string> overrides = small({"memory.budget=1GiB"});
    overrides.insert(overrides.end(), cases[i].begin(), cases[i].end());
    RunOptions options = data.options(std::to_string(i), overrides);
    const std::uint64_t budget = least_budget(options);
    options.memory.budget = {budget, {}};
    LooseQueue memory(std::make_shared<GuardedSpace>(std::size_t{1} << 30));
    const Attempt done = attempt_on(emulated_accelerator(memory), options, Start::kFresh);
    REQUIRE_FALSE(done.stopped);
    // Tables of rows, and the sums of a norm and of a hash (2 KiB each), are not counted.
    const std::size_t peak = memory.peak_bytes();
    CHECK(peak <= budget + (10 << 10));
    CHECK(peak > budget / 4 * 3);
    CHECK(metric(done.steps.at({"ppo", 2}), "memory/device_peak_bytes", 0) <= static_cast<double>(peak));
    CHECK(metric(done.steps.at({"ppo", 2}), "memory/device_peak_bytes", 0) > static_cast<double>(peak) / 2);
  }
}

TEST_CASE("what an accelerator cannot do is refused with the key", "[device]") {
  const TinyData data;
  on_every_accelerator([&](const Accelerator& accelerator) {
    CHECK_THROWS_WITH(attempt_on(accelerator, data.options("int8", {"rollout.weights=int8"}), Start::kFresh),
                      ContainsSubstring("rollout.weights"));
  });
}

TEST_CASE("a run draws its samples over K and V in fp8, and corrects for it", "[device]") {
  const TinyData data;
  on_every_accelerator([&](const Accelerator& accelerator) {
    INFO(accelerator.name);
    const std::vector<std::string> fp8 = {"rollout.kv_dtype=fp8"};
    const auto options = [&](const std::string& name, const std::vector<std::string>& overrides) {
      std::vector<std::string> all = small();
      all.insert(all.end(), overrides.begin(), overrides.end());
      return data.options(std::string(accelerator.name) + name, all);
    };
    const Attempt plain = attempt_on(accelerator, options("plain", {}), Start::kFresh);
    const Attempt run = attempt_on(accelerator, options("fp8", fp8), Start::kFresh);
    REQUIRE_FALSE(run.stopped);
    for (std::int64_t step = 1; step <= 2; ++step) {
      const Metrics& metrics = run.steps.at({"ppo", step});
      CHECK(std::isfinite(metric(metrics, "loss/policy", std::nan(""))));
      // As with rollout.weights: the trainer's old log-probs, and tokens weighted by the ratio to the
      // sampler's.
      CHECK(std::abs(metric(metrics, "rollout_corr/rollout_is_mean", 0) - 1) < 0.1);
      CHECK(metric(plain.steps.at({"ppo", step}), "rollout_corr/rollout_is_mean", -99) == -99);
    }
    const Metrics& first = run.steps.at({"ppo", 1});
    CHECK(metric(first, "rollout/logprob_gap_mean", 0) > 0);
    CHECK(metric(first, "rollout/logprob_gap_mean", 9) < 0.05);
    const std::string again = std::string(accelerator.name) + "again";
    REQUIRE(attempt_on(accelerator, data.options(again, small(fp8)), Start::kFresh, "ppo", 1).stopped);
    REQUIRE_FALSE(attempt_on(accelerator, data.options(again, small(fp8)), Start::kResume).stopped);
    CHECK((final_policy(data, again) == final_policy(data, std::string(accelerator.name) + "fp8")));
    // Other stages that sample, and evaluation, which does not round: before any PPO it is the same.
    attempt_on(accelerator, options("sampled", {"rollout.kv_dtype=fp8", "stages=[sft, rejection_sampling]"}),
               Start::kFresh);
    const std::string stages = "stages=[sft, eval]";
    attempt_on(accelerator, options("judged", {stages}), Start::kFresh);
    attempt_on(accelerator, options("judged8", {"rollout.kv_dtype=fp8", stages}), Start::kFresh);
    const auto samples = [&](const std::string& name) {
      return files_below(data.path(std::string(accelerator.name) + name) / "samples");
    };
    CHECK(samples("judged") == samples("judged8"));
  });
}

TEST_CASE("K and V in fp8 are refused on the CPU, and where old log-probs must be the sampler's") {
  const TinyData data;
  CHECK_THROWS_WITH(attempt(data.options("cpu", {"rollout.kv_dtype=fp8"}), Start::kFresh),
                    ContainsSubstring("rollout.kv_dtype: fp8 is for a GPU"));
  CHECK_THROWS_WITH(data.options("old", {"rollout.kv_dtype=fp8", "ppo.old_log_probs=rollout"}),
                    ContainsSubstring("ppo.old_log_probs") && ContainsSubstring("rollout.kv_dtype is fp8"));
  CHECK_THROWS_WITH(data.options("other", {"rollout.kv_dtype=fp4"}),
                    ContainsSubstring("rollout.kv_dtype") && ContainsSubstring("fp8"));
}

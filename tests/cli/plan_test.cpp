// `rlhf plan` and `rlhf replay` as processes, and the plan against the resident memory of a run.
#include <algorithm>

#include "tests/cli/program.h"

using namespace rlhf;

namespace {

const std::string kGrpo = RLHF_SOURCE_DIR "/configs/simulate/grpo_7b.yaml";

// Four copies of some 5 million parameters: much more than the program itself.
void write_run(const Program& program) {
  std::string prompts;
  for (char c = 'a'; c < 'g'; ++c) prompts += std::string("{\"prompt\": \"say ") + c + ": \"}\n";
  program.write("prompts.jsonl", prompts);
  program.write("run.yaml",
                "run: {name: demo, seed: 2, export_stages: false}\nthreads: 1\n"
                "model: {new: {layers: 6, hidden_size: 256, heads: 4, kv_heads: 2, intermediate_size: 700, "
                "max_positions: 128}}\n"
                "data: {source: files, prompt_text: raw, prompts_file: prompts.jsonl}\n"
                "rewards: [{type: length, max_tokens: 4}]\n"
                "stages: [ppo]\n"
                "rollout: {max_new_tokens: 16, max_sequences: 8}\n"
                "ppo: {iterations: 2, max_tokens_per_micro_batch: 128, algorithm: {prompts_per_step: 4, "
                "epochs: 1, mini_batches: 1, kl: {coefficient: 0.1}}}\n");
}

nlohmann::json plan(const Program& program, std::vector<std::string> arguments, int code) {
  arguments.insert(arguments.begin(), "plan");
  arguments.push_back("--json");
  const Result result = program.run(arguments);
  INFO(result.err);
  REQUIRE(result.code == code);
  return nlohmann::json::parse(result.out);
}

nlohmann::json tenant(const nlohmann::json& plan, const std::string& name) {
  for (const auto& entry : plan["memory"])
    if (entry["tenant"] == name) return entry;
  FAIL("no tenant " << name);
  return {};
}

}  // namespace

TEST_CASE("the plan of a run is what its process holds, with plenty and with little") {
  const Program program;
  write_run(program);
  const auto ample = plan(program, {"run.yaml"}, 0);
  CHECK(ample["fits"] == true);
  const double wanted = ample["wanted_bytes"], minimum = ample["minimum_bytes"];
  CHECK(wanted > 100e6);
  constexpr double kProgram = 30e6;  // code, tokenizer, data, allocator
  for (const double budget : {2 * wanted, minimum + 1e5}) {
    const std::string name = "run" + std::to_string(static_cast<long>(budget));
    const Result run = program.run({"train", "run.yaml", "--json", "--set", "run.dir=" + name, "--set",
                                    "memory.budget=" + std::to_string(static_cast<long>(budget))});
    INFO(run.err);
    REQUIRE(run.code == 0);
    const auto summary = nlohmann::json::parse(run.out);
    const double peak = summary["peak_memory_bytes"];
    INFO("peak " << peak << ", budget " << budget << ", wanted " << wanted);
    CHECK(peak < std::min(budget, wanted) + kProgram);
    CHECK(peak > 0.8 * std::min(budget, wanted));
  }
  // One byte less than the least is refused, and what is advised is enough.
  const std::string too_little = "memory.budget=" + std::to_string(static_cast<long>(minimum) - 1);
  const std::string keep = "memory.recompute=none";
  const Result refused = program.run({"train", "run.yaml", "--set", too_little, "--set", keep});
  CHECK(refused.code == 1);
  CHECK_THAT(refused.err, ContainsSubstring("the run needs at least") &&
                              ContainsSubstring("policy optimizer") &&
                              ContainsSubstring("what would make it fit:") &&
                              ContainsSubstring("ppo.max_tokens_per_micro_batch: "));
  const auto at = refused.err.find("  memory.budget: ") + 17;
  const std::string advised = refused.err.substr(at, refused.err.find('\n', at) - at);
  CHECK(program.run({"plan", "run.yaml", "--set", "memory.budget=" + advised, "--set", keep}).code == 0);
  // Layers that are computed again make room by themselves.
  const auto layers = plan(program, {"run.yaml", "--set", too_little}, 0);
  CHECK(layers["recompute"] == "layers");
  CHECK(program.run({"train", "run.yaml", "--set", too_little, "--overwrite"}).code == 0);
}

TEST_CASE("models and devices that are not here are planned") {
  const Program program;
  const std::vector<std::string> seven = {kGrpo, "--model-shape", "7.6e9,28,3584,512", "--accelerator",
                                          "h100-80g"};
  const auto with = [&](std::vector<std::string> more) {
    more.insert(more.begin(), seven.begin(), seven.end());
    return more;
  };
  const auto one = plan(program, seven, 1);
  CHECK(one["fits"] == false);
  CHECK(one["budget_bytes"] == (std::uint64_t{80} << 30) / 10 * 9);
  REQUIRE_FALSE(one["advice"].empty());
  // An advice is taken at its word.
  for (const auto& advice : one["advice"]) {
    std::vector<std::string> changes;
    for (const auto& [key, value] : advice["changes"].items()) {
      const std::string text = value;
      if (key.starts_with("--"))
        changes.insert(changes.end(), {key, text});
      else
        changes.insert(changes.end(), {"--set", key + "=" + text});
    }
    INFO(advice.dump());
    CHECK(plan(program, with(changes), 0)["minimum_bytes"] == advice["minimum_bytes"]);
  }

  const auto eight =
      plan(program,
           with({"--devices", "8", "--shard", "weights", "--set", "ppo.max_tokens_per_micro_batch=9000"}), 0);
  CHECK(tenant(eight, "policy weights")["train"]["held"].get<double>() ==
        Approx(2 * 7.6e9 / 8).epsilon(0.001));
  REQUIRE(eight["modes"].size() == 4);
  CHECK(eight["modes"][0]["gain"] == 1);
  CHECK(eight["modes"][3]["gain"] > 1);
  double phases = 0;
  for (const char* phase : {"generate", "score", "train", "optimize"})
    phases += eight["phases_s"][phase].get<double>();
  // What is left of an iteration in mode serial is waiting: for the slowest device, and for gradients.
  CHECK(phases <= eight["modes"][0]["iteration_s"].get<double>() * 1.2);
  CHECK(phases > 0);
  CHECK(eight["streamed_overlaps_training"] == true);

  const std::vector<std::string> seventy = {
      kGrpo, "--model-shape", "70.6e9,80,8192,1024", "--accelerator", "h100-80g", "--devices", "8"};
  const auto large = plan(program, seventy, 1);
  CHECK(large["sharding"] == "optimizer");
  CHECK_THAT(large["assumptions"].dump(),
             ContainsSubstring("divided over them, not copied: optimizer state"));
  REQUIRE_FALSE(large["advice"].empty());
  CHECK(large["advice"][0]["changes"].contains("model.trainable"));

  const Result text = program.run(
      {"plan", kGrpo, "--model-shape", "1.2e9,16,2048,512", "--device-memory", "80GiB", "--numbers", "bf16"});
  INFO(text.err);
  CHECK(text.code == 0);
  CHECK_THAT(text.out, ContainsSubstring("what limits the batch") && ContainsSubstring("no rates: --from") &&
                           ContainsSubstring("streamed overlaps scoring and training\n"));
  const Result whitened = program.run({"plan", kGrpo, "--model-shape", "1.2e9,16,2048,512", "--device-memory",
                                       "80GiB", "--set", "ppo.algorithm.advantage.whitening=bessel"});
  CHECK_THAT(whitened.out,
             ContainsSubstring("streamed overlaps scoring alone: ppo.algorithm.advantage.whitening"));
}

TEST_CASE("what cannot be names both sides") {
  const Program program;
  struct Case {
    std::vector<std::string> more;
    std::vector<std::string> words;
  };
  for (const Case& c :
       {Case{{"--shard", "weights"}, {"--shard weights", "--devices"}},
        Case{{"--devices", "64"}, {"--devices 64", "ppo.algorithm.prompts_per_step 8"}},
        Case{{"--device-memory", "8GiB", "--set", "memory.budget=9GiB"},
             {"memory.budget 9GiB", "--device-memory"}},
        Case{{"--device-memory", "much"}, {"--device-memory: got 'much'"}},
        Case{{"--set", "rollout.kv_dtype=fp8"}, {"rollout.kv_dtype: fp8", "--numbers bf16"}},
        Case{{"--set", "schedule.mode=async", "--set", "schedule.max_staleness=0"},
             {"schedule.max_staleness", "schedule.mode async"}},
        Case{{"--set", "schedule.mode=streamed", "--set", "schedule.require_early_training=true", "--set",
              "ppo.algorithm.advantage.whitening=bessel"},
             {"schedule.require_early_training", "ppo.algorithm.advantage.whitening"}},
        Case{{"--set", "schedule.require_early_training=true"},
             {"schedule.require_early_training", "schedule.mode serial"}}}) {
    std::vector<std::string> arguments = {"plan", kGrpo, "--model-shape", "1.2e9,16,2048,512"};
    arguments.insert(arguments.end(), c.more.begin(), c.more.end());
    const Result result = program.run(arguments);
    INFO(result.err);
    CHECK(result.code == 2);
    for (const std::string& word : c.words) CHECK_THAT(result.err, ContainsSubstring(word));
    CHECK(result.out.empty());
  }
}

TEST_CASE("a step is replayed, and an altered record ends with 1") {
  const Program program;
  write_run(program);
  REQUIRE(program.run({"train", "run.yaml", "--set", "run.dir=run"}).code == 0);
  const Result same = program.run({"replay", "run", "--step", "2"});
  INFO(same.err);
  CHECK(same.code == 0);
  CHECK_THAT(same.out, ContainsSubstring("step 2, executed from step 1 on") &&
                           ContainsSubstring("samples: same (") && ContainsSubstring("policy: same ("));
  std::string text = read_text_file(program.path("run/hashes.jsonl"));
  const auto digit = text.rfind("\"policy\":\"") + 10;
  text[digit] = text[digit] == '0' ? '1' : '0';
  program.write("run/hashes.jsonl", text);
  const Result different = program.run({"replay", "run", "--step", "2", "--json"});
  CHECK(different.code == 1);
  const auto json = nlohmann::json::parse(different.out);
  CHECK(json["same"] == false);
  CHECK(json["hashes"]["policy"]["same"] == false);
  CHECK(json["hashes"]["samples"]["same"] == true);
  CHECK(program.run({"replay", "run", "--step", "3"}).code == 2);
  CHECK(program.run({"replay", "none", "--step", "1"}).code == 2);
}

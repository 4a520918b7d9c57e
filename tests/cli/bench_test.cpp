// The benchmarks do the work that they say: numbers of tokens are checked, speeds are not.
#include "tests/cli/program.h"

using namespace rlhf;

namespace {

// A package over the small models whose logits are held to transformers'.
struct Package : Program {
  Package() {
    const auto golden = std::filesystem::path(RLHF_SOURCE_DIR) / "tests" / "golden";
    std::filesystem::create_directory(path("work"));
    for (const auto& [name, model] : {std::pair{"policy", "model_llama_gqa_untied"},
                                      {"reward", "model_llama_reward"},
                                      {"value", "model_llama_reward"}})
      std::filesystem::create_directory_symlink(golden / model, path("work") + "/" + name);
    write("work/work.json", R"({"variant": "golden", "pad_token_id": 0, "eos_token_id": 2})");
    write("work/prompts.jsonl",
          "{\"input_ids\": [5, 6, 7]}\n{\"input_ids\": [5, 6, 8, 9]}\n{\"input_ids\": [11]}\n");
    write("work/lengths.json", R"({"fraction": [0.5, 0.25, 1.0, 0.3, 0.75]})");
  }
  nlohmann::json bench(std::vector<std::string> arguments) const {
    arguments.insert(arguments.begin(), "bench");
    const Result result = run(arguments);
    INFO(result.err);
    REQUIRE(result.code == 0);
    REQUIRE(result.lines().size() == 1);
    return result.lines().front();
  }
};

}  // namespace

TEST_CASE("bench rollout gives responses the lengths of the package") {
  const Package package;
  const std::vector<std::string> arguments = {"rollout", "--work",        "work", "--response-tokens",
                                              "12",      "--batch",       "3",    "--requests",
                                              "7",       "--repetitions", "1",    "--mode"};
  const auto with_mode = [&](const std::string& mode) {
    auto all = arguments;
    all.push_back(mode);
    return package.bench(all);
  };
  const auto natural = with_mode("natural");
  CHECK(natural["tokens"] == 6 + 3 + 12 + 4 + 9 + 6 + 3);  // 12 times the fractions
  CHECK(natural["tokens_per_s"] > 0);
  CHECK(with_mode("fixed")["tokens"] == 7 * 12);
}

TEST_CASE("bench pipeline runs PPO and GRPO on a package in every mode") {
  const Package package;
  const std::vector<std::string> arguments = {
      "pipeline", "--work",       "work", "--mode",       "natural", "--response-tokens", "12", "--batch",
      "4",        "--ppo-epochs", "1",    "--iterations", "1",       "--warmup",          "1"};
  const auto run = [&](const std::vector<std::string>& more) {
    auto all = arguments;
    all.insert(all.end(), more.begin(), more.end());
    const auto out = package.bench(all);
    // Slots 4 to 7 are measured: 9, 6, 3 and 12 tokens.
    CHECK(out["response_tokens_per_s"].get<double>() / out["samples_per_s"].get<double>() ==
          Approx(30.0 / 4));
    return out;
  };
  CHECK(run({})["algorithm"] == "trl-ppo");
  CHECK(run({"--recompute"})["recompute"] == true);
  CHECK(run({"--last-layers", "1"})["last_layers"] == 1);
  for (const std::string mode : {"serial", "streamed", "one_step_off", "async"})
    CHECK(run({"--group-size", "2", "--schedule", mode})["schedule"] == mode);
  CHECK(
      package.run({"bench", "pipeline", "--work", "work", "--mode", "both", "--response-tokens", "4"}).code ==
      2);
}

TEST_CASE("all rungs of the ladder learn the same") {
  const Package package;
  for (const std::vector<std::string>& more :
       std::vector<std::vector<std::string>>{{}, {"--last-layers", "1"}}) {
    std::vector<double> top;
    for (const std::string rung : {"B4", "B3", "B2", "B1", "B0"}) {
      std::vector<std::string> arguments = {"pipeline", "--work",
                                            "work",     "--response-tokens",
                                            "12",       "--batch",
                                            "4",        "--rung",
                                            rung,       "--iterations",
                                            "2",        "--warmup",
                                            "0",        "--micro-batch-tokens",
                                            "32"};
      arguments.insert(arguments.end(), more.begin(), more.end());
      const auto learned = package.bench(arguments)["learned"].get<std::vector<double>>();
      REQUIRE(learned.size() == 4);
      if (top.empty()) top = learned;
      INFO(rung);
      for (std::size_t k = 0; k < 4; ++k) {
        CHECK(std::abs(top[k]) > 1e-6);
        CHECK(learned[k] == Approx(top[k]).epsilon(1e-3));
      }
    }
  }
}

TEST_CASE("bench train and decode count their tokens") {
  const Package package;
  const auto train = package.bench({"train", "--model", "work/policy", "--tokens", "70", "--sequence", "16",
                                    "--repetitions", "1", "--recompute"});
  CHECK(train["tokens"] == 64);  // whole sequences
  CHECK(train["tokens_per_s"] > 0);
  CHECK(train["flop_share"] > 0);
  const auto work = package.bench({"train", "--model", "work/policy", "--work", "work", "--rows", "4",
                                   "--response-tokens", "12", "--repetitions", "1"});
  CHECK(work["mode"] == "natural");
  for (const std::string verb : {"rollout", "pipeline"}) {
    const Result missing = package.run({"bench", verb, "--work", "work"});
    CHECK(missing.code == 2);
    CHECK_THAT(missing.err, ContainsSubstring("--response-tokens"));
  }
  CHECK(work["targets"] == 6 + 3 + 12 + 4);     // 12 times the fractions
  CHECK(work["tokens"] == 25 + 3 + 4 + 1 + 3);  // and the prompts
  const auto decode = package.bench({"decode", "--model", "work/policy", "--batch", "2", "--context", "5",
                                     "--new-tokens", "6", "--repetitions", "1"});
  CHECK(decode["decode_tokens_per_s"] > 0);
  for (const char* peak : {"machine_gb_per_s", "machine_gflop_per_s"}) CHECK(decode[peak] > 0.01);
}

TEST_CASE("the instruction set can be chosen from outside") {
  const Package package;
  const std::vector<std::string> arguments = {"bench",         "decode", "--model",      "work/policy",
                                              "--context",     "3",      "--new-tokens", "2",
                                              "--repetitions", "1"};
  const auto with = [&](const char* isa) {
    setenv("RLHF_CPU_ISA", isa, 1);
    const Result result = package.run(arguments);
    unsetenv("RLHF_CPU_ISA");
    return result;
  };
  const Result plain = with("baseline");
  REQUIRE(plain.code == 0);
  CHECK(plain.lines().front()["cpu_isa"] == "baseline");
  const Result wrong = with("sse9");
  CHECK(wrong.code != 0);
  CHECK_THAT(wrong.err, ContainsSubstring("RLHF_CPU_ISA is \"sse9\", expected baseline, avx2 or avx512"));
}

// Help, exit codes and messages: 0 ok, 1 failure, 2 bad configuration or usage.
#include "tests/cli/program.h"

using namespace rlhf;

namespace {
const std::vector<std::string> kVerbs = {"train",    "generate", "score",   "tokenize", "eval",
                                         "inspect",  "config",   "convert", "bench",    "verify",
                                         "simulate", "plan",     "replay"};
}

TEST_CASE("every verb explains itself") {
  const Program program;
  const Result all = program.run({"--help"});
  CHECK(all.code == 0);
  for (const std::string& verb : kVerbs) {
    CHECK_THAT(all.out, ContainsSubstring(verb));
    const Result help = program.run({verb, "--help"});
    INFO(verb << ": " << help.err);
    CHECK(help.code == 0);
    CHECK_THAT(help.out, ContainsSubstring("Options:"));
    CHECK(help.err.empty());
  }
  CHECK(program.run({"--version"}).code == 0);
  CHECK_THAT(program.run({"--version"}).out, ContainsSubstring("."));
}

TEST_CASE("bad usage ends with 2 and says what is wrong") {
  const Program program;
  struct Case {
    std::vector<std::string> arguments;
    std::string message;
  };
  for (const Case& c :
       {Case{{}, "subcommand"},
        Case{{"fly"}, "there is no verb 'fly'"},
        Case{{"generate"}, "--model"},
        Case{{"generate", "--model", "m"}, "--input"},
        Case{{"generate", "--model", "m", "--input", "i", "--tempo", "1"}, "--tempo"},
        Case{{"generate", "--model", "m", "--input", "i", "--temperature", "-1"}, "--temperature"},
        Case{{"generate", "--model", "m", "--input", "i", "--top-p", "1.5"}, "--top-p"},
        Case{{"generate", "--model", "m", "--input", "i", "--n", "0"}, "--n"},
        Case{{"generate", "--model", "m", "--input", "i", "--weights", "int4"},
             "--weights: int4 not in {fp32,bf16"},
        Case{{"bench", "decode", "--model", "m", "--weights", "fp16"}, "--weights: fp16 not in"},
        Case{{"generate", "--model", "m", "--input", "i", "--kv-dtype", "int4"}, "--kv-dtype: int4 not in"},
        Case{{"score", "--model", "m", "--input", "i", "--temperature", "0"}, "--temperature"},
        Case{{"tokenize", "--input", "i"}, "--model"},
        Case{{"train"}, "run"},
        Case{{"train", "a.yaml", "--resume", "--overwrite"}, "--overwrite"},
        Case{{"convert", "a"}, "output"},
        Case{{"inspect"}, "model"},
        Case{{"verify", "--vectors", "/none"}, "/none"},
        Case{{"simulate", "a.yaml", "--modes", "fast"}, "--modes"},
        Case{{"plan"}, "run"},
        Case{{"plan", "a.yaml", "--shard", "all"}, "--shard"},
        Case{{"plan", "a.yaml", "--accelerator", "abacus"}, "abacus"},
        Case{{"replay", "runs/a"}, "--step"},
        Case{{"simulate", "a.yaml", "--devices", "0"}, "--devices"},
        Case{{"simulate", "a.yaml", "--accelerator", "h100-80g"}, "--model-shape"},
        Case{{"simulate", "a.yaml", "--accelerator", "abacus", "--model-shape", "1,1,1,1"}, "abacus"},
        Case{{"simulate", "a.yaml", "--accelerator", "h100-80g", "--model-shape", "7e9"},
             "--model-shape: got '7e9'"}}) {
    const Result result = program.run(c.arguments);
    INFO(result.err);
    CHECK(result.code == 2);
    CHECK_THAT(result.err, ContainsSubstring(c.message));
    CHECK(result.out.empty());
  }
}

TEST_CASE("a bad run file ends with 2; all problems are shown with file, line, column and nearest key") {
  const Program program;
  program.write("bad.yaml",
                "model: {new: {layers: 2}}\n"
                "ppo:\n"
                "  iteration: 5\n"
                "  algorithm: {policy: {clip_lo: 0.1}}\n"
                "sft: {max_steps: many}\n"
                "stages: [sft, dance]\n"
                "seed: 4\n");
  for (const std::vector<std::string>& arguments : {std::vector<std::string>{"train", "bad.yaml"},
                                                    {"config", "check", "bad.yaml"},
                                                    {"eval", "bad.yaml"}}) {
    const Result result = program.run(arguments);
    INFO(result.err);
    CHECK(result.code == 2);
    CHECK_THAT(result.err, ContainsSubstring("bad configuration"));
    CHECK_THAT(result.err,
               ContainsSubstring("bad.yaml:3:3: ppo.iteration: unknown key; nearest key is ppo.iterations"));
    CHECK_THAT(result.err, ContainsSubstring("bad.yaml:4:24: ppo.algorithm.policy.clip_lo: unknown key; "
                                             "nearest key is ppo.algorithm.policy.clip_low"));
    CHECK_THAT(result.err, ContainsSubstring(
                               "bad.yaml:5:18: sft.max_steps: got many, expected an integer in [0, 1e+09]"));
    CHECK_THAT(result.err, ContainsSubstring("bad.yaml:7:1: seed: unknown key; nearest key is run.seed"));
    CHECK(result.out.empty());
  }
  CHECK_FALSE(std::filesystem::exists(program.path("runs")));
  // Values are checked when the keys are known.
  program.write("stages.yaml", "model: {new: {layers: 2}}\nstages: [sft, dance]\n");
  const Result stages = program.run({"train", "stages.yaml"});
  CHECK(stages.code == 2);
  CHECK_THAT(stages.err, ContainsSubstring("'dance' is no stage; expected one of pretrain, sft, reward, "));
  const Result override_problem =
      program.run({"train", "stages.yaml", "--set", "stages=[sft]", "--set", "sft.epoch=2"});
  CHECK(override_problem.code == 2);
  CHECK_THAT(override_problem.err,
             ContainsSubstring("sft.epoch") && ContainsSubstring("nearest key is sft.epochs"));
}

TEST_CASE("missing files end with 1, a missing run file with 2, and are named") {
  const Program program;
  const std::string model = RLHF_SOURCE_DIR "/tests/golden/model_llama_gqa_untied";
  program.write("empty.jsonl", "");
  program.write("bad.jsonl", "{\"input_ids\": [1, 2]}\n{\"input_ids\": [1,\n");
  program.write("keys.jsonl", "{\"ids\": [1, 2]}\n");
  program.write("text.jsonl", "{\"text\": \"a\"}\n");
  program.write("outside.jsonl", "{\"input_ids\": [1, 96]}\n");
  struct Case {
    std::vector<std::string> arguments;
    std::string message;
    int code = 1;
  };
  for (const Case& c :
       {Case{{"generate", "--model", "none", "--input", "empty.jsonl"}, "none: no such file"},
        Case{{"score", "--model", "none", "--input", "empty.jsonl"}, "none: no such file"},
        Case{{"tokenize", "--model", "none", "--input", "empty.jsonl"}, "none: no such file"},
        Case{{"inspect", "none"}, "none: no such file"},
        Case{{"convert", "none", "out"}, "none: no such file"},
        Case{{"generate", "--model", model, "--input", "none.jsonl"}, "none.jsonl: cannot be opened"},
        Case{{"score", "--model", model, "--input", "none.jsonl"}, "none.jsonl: cannot be opened"},
        Case{{"score", "--model", model, "--input", "empty.jsonl"}, "empty.jsonl: holds no lines"},
        Case{{"score", "--model", model, "--input", "bad.jsonl"}, "bad.jsonl:2: not JSON"},
        Case{{"score", "--model", model, "--input", "keys.jsonl"},
             "keys.jsonl:1: expected one of the keys input_ids, prompt, text, messages"},
        Case{{"score", "--model", model, "--input", "outside.jsonl"},
             "outside.jsonl:1: token id 96 is outside the vocabulary of 96"},
        Case{{"generate", "--model", model, "--input", "outside.jsonl"},
             "outside.jsonl:1: token id 96 is outside the vocabulary of 96"},
        Case{{"score", "--model", model, "--input", "text.jsonl"},
             "text.jsonl:1: this model has no tokenizer"},
        Case{{"tokenize", "--model", model, "--input", "text.jsonl"},
             "text.jsonl:1: this model has no tokenizer"},
        Case{{"train", "none.yaml"}, "none.yaml", 2},
        Case{{"config", "check", "none.yaml"}, "none.yaml", 2}}) {
    const Result result = program.run(c.arguments);
    INFO(c.arguments[0] << ": " << result.err);
    CHECK(result.code == c.code);
    CHECK_THAT(result.err, ContainsSubstring("rlhf: ") && ContainsSubstring(c.message));
    CHECK(result.out.empty());
  }
  CHECK_FALSE(std::filesystem::exists(program.path("out")));
}

TEST_CASE("config lists, explains, checks and compares") {
  const Program program;
  const Result list = program.run({"config"});
  CHECK(list.code == 0);
  CHECK_THAT(list.out, ContainsSubstring("run.seed  (") && ContainsSubstring("Seed of data order"));
  const auto keys = nlohmann::json::parse(program.run({"config", "--json"}).out);
  const auto seed = std::ranges::find_if(keys, [](const auto& entry) { return entry["key"] == "run.seed"; });
  REQUIRE(seed != keys.end());
  CHECK((*seed)["default"] == "1");
  CHECK_FALSE((*seed)["help"].empty());

  const Result explain = program.run({"config", "explain", "ppo.iterations"});
  CHECK(explain.code == 0);
  CHECK_THAT(explain.out, ContainsSubstring("Rollout batches") && ContainsSubstring("20"));
  const Result unknown = program.run({"config", "explain", "ppo.iteration"});
  CHECK(unknown.code != 0);
  CHECK_THAT(unknown.err, ContainsSubstring("iterations"));

  program.write("run.yaml", "model: {new: {layers: 3}}\nstages: [pretrain]\n");
  const Result check = program.run({"config", "check", "run.yaml", "--set", "run.seed=9"});
  CHECK(check.code == 0);
  CHECK_THAT(check.out, ContainsSubstring("layers: 3") && ContainsSubstring("seed: 9"));
  // What it prints is a run file with the same meaning.
  program.write("resolved.yaml", check.out);
  const Result same = program.run({"config", "diff", "resolved.yaml", "resolved.yaml"});
  CHECK((same.code == 0 && same.out.empty()));
  const Result differ = program.run({"config", "diff", "resolved.yaml", "run.yaml"});
  CHECK(differ.code == 1);
  CHECK(differ.out == "run.seed: 9 (resolved.yaml:4:3) -> 1 (default)\n");
}

TEST_CASE("config diff compares presets, run files and run directories, and says where values come from") {
  const Program program;
  const Result presets = program.run({"config", "diff", "trl-ppo", "verl-ppo", "--json"});
  INFO(presets.err);
  CHECK(presets.code == 1);
  std::map<std::string, nlohmann::json> rows;
  for (const auto& row : nlohmann::json::parse(presets.out)) rows[row["key"]] = row;
  for (const auto& [key, row] : rows) CHECK(key.starts_with("ppo.algorithm."));
  const auto& epochs = rows.at("ppo.algorithm.epochs");
  CHECK(epochs["left"] == "4");
  CHECK(epochs["right"] == "1");
  CHECK(epochs["left_origin"] == "configs/presets/trl-ppo.yaml:5:1");
  CHECK(rows.at("ppo.algorithm.policy.dual_clip")["left_origin"].is_null());  // a default value
  CHECK(rows.count("ppo.algorithm.policy.clip_low") == 0);                    // equal in both

  program.write("mine.yaml", "preset: dapo\nepochs: 3\n");
  program.write("run.yaml",
                "model: {new: {layers: 3}}\n"
                "ppo: {iterations: 5, algorithm: {preset: mine.yaml, mini_batches: 2}}\n");
  const Result against = program.run({"config", "diff", "dapo", "run.yaml"});
  CHECK(against.code == 1);
  CHECK(against.out ==
        "ppo.algorithm.epochs: 1 (configs/presets/dapo.yaml:5:1) -> 3 (mine.yaml:2:1)\n"
        "ppo.algorithm.mini_batches: 16 (configs/presets/dapo.yaml:6:1) -> 2 (run.yaml:2:53)\n");
  std::filesystem::create_directory(program.path("finished"));
  program.write("finished/config.resolved.yaml", program.run({"config", "check", "run.yaml"}).out);
  CHECK(program.run({"config", "diff", "finished", "run.yaml"}).code == 0);

  const Result unknown = program.run({"config", "diff", "verl-grpo", "verl-gppo"});
  CHECK(unknown.code == 2);
  CHECK_THAT(unknown.err,
             ContainsSubstring("verl-gppo: neither a file nor a preset; nearest preset is verl-"));
}

TEST_CASE("config presets prints the files of configs/presets") {
  const Program program;
  const Result list = program.run({"config", "presets"});
  CHECK(list.code == 0);
  std::size_t files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(RLHF_SOURCE_DIR "/configs/presets")) {
    const std::string name = entry.path().stem().string();
    CHECK_THAT(list.out, ContainsSubstring(name + "  # "));
    CHECK(program.run({"config", "presets", name}).out == read_text_file(entry.path()));
    ++files;
  }
  CHECK(static_cast<std::size_t>(std::ranges::count(list.out, '\n')) == files);
  CHECK(program.run({"config", "presets", "none"}).code == 2);
}

TEST_CASE("simulate compares modes and devices, prints its costs, and reads them back") {
  const Program program;
  const std::string run = RLHF_SOURCE_DIR "/configs/runs/randomwalks.yaml";
  program.write("rates.yaml",
                "lengths: {prompt_tokens: 1, mean_tokens: 6, sigma: 0.5}\n"
                "decode: {step_s: 0.001}\n"
                "train: {token_s: 0.0001}\n");
  const Result table = program.run({"simulate", run, "--rates", "rates.yaml", "--devices", "1,4"});
  INFO(table.err);
  REQUIRE(table.code == 0);
  for (const char* text : {"async", "staleness", "1 device: ", "4 devices: "})
    CHECK_THAT(table.out, ContainsSubstring(text));
  const std::vector<std::string> arguments = {"simulate",
                                              run,
                                              "--rates",
                                              "rates.yaml",
                                              "--json",
                                              "--devices",
                                              "2",
                                              "--modes",
                                              "streamed,async",
                                              "--iterations",
                                              "3",
                                              "--set",
                                              "schedule.mode=async",
                                              "--set",
                                              "schedule.max_staleness=2"};
  const Result result = program.run(arguments);
  INFO(result.err);
  REQUIRE(result.code == 0);
  CHECK(program.run(arguments).out == result.out);
  const auto json = nlohmann::json::parse(result.out);
  REQUIRE(json.size() == 1);
  CHECK(json[0]["devices"] == 2);
  REQUIRE(json[0]["modes"].size() == 2);
  CHECK(json[0]["modes"][0]["mode"] == "streamed");
  CHECK(json[0]["modes"][0]["staleness"].size() == 1);
  CHECK(json[0]["modes"][1]["all_iterations_s"].size() == 3);
  CHECK(json[0]["modes"][1]["staleness"].size() <= 3);

  const Result rates = program.run({"simulate", run, "--rates", "rates.yaml", "--print-rates"});
  REQUIRE(rates.code == 0);
  program.write("printed.yaml", rates.out);
  CHECK(program.run({"simulate", run, "--rates", "printed.yaml", "--devices", "1,4"}).out == table.out);

  program.write("bad.yaml", "decode: {step: 1}\n");
  const Result bad = program.run({"simulate", run, "--rates", "bad.yaml"});
  CHECK(bad.code == 2);
  CHECK_THAT(bad.err, ContainsSubstring("bad.yaml:1:10: decode.step: unknown key"));
  const Result many = program.run({"simulate", run, "--devices", "64"});
  CHECK(many.code == 1);
  CHECK_THAT(many.err, ContainsSubstring("ppo.algorithm.prompts_per_step"));
}

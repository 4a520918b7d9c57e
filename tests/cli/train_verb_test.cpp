// `rlhf train`: a whole run, stopped by a signal and resumed.
#include "tests/cli/program.h"

using namespace rlhf;
namespace fs = std::filesystem;

namespace {

void write_run(const Program& program) {
  std::string sft;
  for (char c = 'a'; c < 'k'; ++c)
    sft += std::string("{\"prompt\": \"say ") + c + ": \", \"response\": \"" + std::string(12, c) + "\"}\n";
  program.write("sft.jsonl", sft);
  program.write("run.yaml",
                "run: {name: demo, seed: 2}\nthreads: 1\n"
                "model: {new: {layers: 2, hidden_size: 32, heads: 2, kv_heads: 2, intermediate_size: 64, "
                "max_positions: 64}}\n"
                "data: {source: files, prompt_text: raw, sft_file: sft.jsonl, eval_file: sft.jsonl}\n"
                "rewards: [{type: length, max_tokens: 4}]\n"
                "stages: [sft, eval]\nsft: {max_steps: 150, examples_per_step: 6}\n"
                "rollout: {max_new_tokens: 8}\n");
}

std::size_t lines_of(const fs::path& path) {
  std::error_code code;
  if (!fs::exists(path, code)) return 0;
  return static_cast<std::size_t>(std::ranges::count(read_text_file(path), '\n'));
}

}  // namespace

TEST_CASE(
    "a run stopped by SIGINT or SIGTERM leaves a checkpoint, says how to go on, and ends as if not stopped") {
  const Program program;
  write_run(program);
  const Result whole = program.run({"train", "run.yaml", "--set", "run.dir=whole"});
  INFO(whole.err);
  REQUIRE(whole.code == 0);
  CHECK_THAT(whole.out, ContainsSubstring("# demo"));
  CHECK_THAT(whole.err, ContainsSubstring("results: whole/report.md"));
  for (const char* name :
       {"config.resolved.yaml", "metrics.jsonl", "summary.json", "report.md",
        "checkpoints/sft.final.safetensors", "checkpoints/sft/model.safetensors", "samples/eval_sft.jsonl"})
    CHECK(fs::exists(program.path("whole") + "/" + name));
  CHECK(lines_of(program.path("whole/metrics.jsonl")) == 152);

  for (const int signal : {SIGINT, SIGTERM}) {
    const std::string run = signal == SIGINT ? "int" : "term", set = "run.dir=" + run;
    const Result stopped = program.run({"train", "run.yaml", "--set", set}, "", [&](pid_t pid) {
      CHECK(wait_until([&] { return lines_of(program.path(run + "/metrics.jsonl")) > 4; }));
      kill(pid, signal);
    });
    INFO(stopped.err);
    CHECK(stopped.code == 1);
    CHECK_THAT(stopped.err,
               ContainsSubstring("stopped; continue with: rlhf train run.yaml --set " + set + " --resume"));
    CHECK(fs::exists(program.path(run + "/checkpoints/sft.json")));
    CHECK_FALSE(fs::exists(program.path(run + "/summary.json")));
    const std::size_t done = lines_of(program.path(run + "/metrics.jsonl"));
    CHECK(done < 151);

    const Result again = program.run({"train", "run.yaml", "--set", set});
    CHECK(again.code == 1);
    CHECK_THAT(
        again.err,
        ContainsSubstring(
            run + " holds an unfinished run; pass --resume to continue it or --overwrite to replace it"));

    const Result resumed = program.run({"train", "run.yaml", "--set", set, "--resume"});
    INFO(resumed.err);
    CHECK(resumed.code == 0);
    CHECK(read_text_file(program.path(run + "/checkpoints/sft.final.safetensors")) ==
          read_text_file(program.path("whole/checkpoints/sft.final.safetensors")));
    CHECK(read_text_file(program.path(run + "/samples/eval_sft.jsonl")) ==
          read_text_file(program.path("whole/samples/eval_sft.jsonl")));
    CHECK(lines_of(program.path(run + "/metrics.jsonl")) == 152);
    const Result finished = program.run({"train", "run.yaml", "--set", set});
    CHECK(finished.code == 1);
    CHECK_THAT(finished.err,
               ContainsSubstring(run + " holds a finished run; pass --overwrite to replace it"));
  }
}

TEST_CASE("a second SIGINT ends the program at once; the run can be resumed from its last checkpoint") {
  const Program program;
  write_run(program);
  const std::vector<std::string> arguments = {
      "train", "run.yaml", "--set", "sft.max_tokens_per_micro_batch=8", "--set", "sft.examples_per_step=400"};
  const Result killed = program.run(arguments, "", [&](pid_t pid) {
    CHECK(wait_until([&] { return lines_of(program.path("runs/demo/metrics.jsonl")) > 1; }));
    kill(pid, SIGINT);
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    kill(pid, SIGINT);
  });
  // 130, or 1 when the step ended between the two signals.
  INFO(killed.err);
  CHECK((killed.code == 130 || killed.code == 1));
}

TEST_CASE("train prints the summary as JSON and fails when the model got worse") {
  const Program program;
  write_run(program);
  const Result result = program.run({"train", "run.yaml", "--json", "--set", "sft.max_steps=2"});
  INFO(result.err);
  REQUIRE(result.code == 0);
  const auto summary = nlohmann::json::parse(result.out);
  CHECK(summary["name"] == "demo");
  CHECK(summary["tasks"]["default"]["stages"].contains("base"));
  CHECK(summary["tasks"]["default"]["stages"].contains("sft"));
  CHECK(summary == nlohmann::json::parse(read_text_file(program.path("runs/demo/summary.json"))));
}

TEST_CASE("the untrained model may answer fewer cases, and is compared on those") {
  const Program program;
  write_run(program);
  const Result result =
      program.run({"train", "run.yaml", "--json", "--set", "sft.max_steps=2", "--set", "eval.base_cases=1"});
  INFO(result.err);
  REQUIRE(result.code == 0);
  CHECK(lines_of(program.path("runs/demo/samples/eval_base.jsonl")) == 1);
  const auto task = nlohmann::json::parse(result.out)["tasks"]["default"];
  CHECK(task["stages"]["base"]["count"] == 1);
  const auto first = [&](const std::string& stage) {
    std::ifstream file(program.path("runs/demo/samples/eval_" + stage + ".jsonl"));
    std::string line;
    std::getline(file, line);
    return nlohmann::json::parse(line)["score"].get<double>();
  };
  CHECK(task["comparisons"][0]["difference"] == first("sft") - first("base"));
}

TEST_CASE("a run whose data are missing leaves nothing that stands in its way") {
  const Program program;
  write_run(program);
  fs::rename(program.path("sft.jsonl"), program.path("away.jsonl"));
  const Result missing = program.run({"train", "run.yaml"});
  CHECK(missing.code == 1);
  CHECK_THAT(missing.err, ContainsSubstring("rlhf: sft.jsonl: no such file"));
  fs::rename(program.path("away.jsonl"), program.path("sft.jsonl"));
  CHECK(program.run({"train", "run.yaml", "--set", "sft.max_steps=2"}).code == 0);
}

// Costs out of run directories whose costs are known, and the shape of a run as the simulator sees it.
#include "rlhf/train/simulation.h"

#include <filesystem>
#include <nlohmann/json.hpp>

#include "rlhf/config/writer.h"
#include "rlhf/core/atomic_file.h"
#include "rlhf/core/error.h"
#include "rlhf/schedule/roofline.h"
#include "tests/catch.h"
#include "tests/data/temporary_folder.h"

using namespace rlhf;

namespace {

// A run of 4 prompts x 2 samples, 3 epochs x 2 mini-batches.
RunOptions run_options() {
  auto options = config::parse<RunOptions>(
      "model: {new: {layers: 2}}\n"
      "rollout: {max_new_tokens: 1000, max_sequences: 6, max_tokens_per_step: 77}\n"
      "ppo:\n"
      "  iterations: 9\n"
      "  max_tokens_per_micro_batch: 333\n"
      "  algorithm: {preset: trl-rloo, prompts_per_step: 4, samples_per_prompt: 2, epochs: 3, mini_batches: "
      "2}\n"
      "run: {seed: 5}\n",
      "run.yaml");
  return options;
}

// What a machine with these costs would have logged: a decode step 0.01 s and 0.001 s a row, scoring 0.002 s
// and training 0.003 s a row, an optimizer step 0.5 s.
std::string metric_lines(double speed) {
  std::string lines = R"({"stage": "sft", "step": 1, "loss": 2})"
                      "\n";
  for (int step = 1; step <= 5; ++step) {
    const double mean = 20 + 3 * step, steps = 40 + step * step, rows = 8 * mean + 4 * 7;
    const nlohmann::json line = {{"stage", "ppo"},
                                 {"step", step},
                                 {"rollout/mean_length", mean},
                                 {"rollout/length_stddev", 0},
                                 {"rollout/prompt_tokens", 7},
                                 {"rollout/decode_steps", steps},
                                 {"time/generate_s", (0.01 * steps + 0.001 * rows) / speed},
                                 {"time/score_s", 0.002 * rows},
                                 {"time/train_s", (0.003 * 3 * (8 * mean + 4 * 7) + 6 * 0.5) / speed}};
    lines += line.dump() + "\n";
  }
  return lines;
}

constexpr const char* kTrace = R"([
{"ph": "M", "name": "thread_name", "tid": 1, "args": {"name": "train lane"}},
{"ph": "X", "name": "optimize", "ts": 1, "dur": 500000, "tid": 1},
{"ph": "X", "name": "optimize", "ts": 2, "dur": 500000, "tid": 1},
{"ph": "X", "name": "finish", "ts": 3, "dur": 2000, "tid": 1},
{"ph": "X", "name": "publish", "ts": 4, "dur": 1000, "tid": 1}
])";

void write_run(const std::filesystem::path& folder, const RunOptions& options, double speed = 1) {
  std::filesystem::create_directories(folder);
  config::save_resolved(folder / "config.resolved.yaml", options);
  write_file_atomically(folder / "metrics.jsonl", metric_lines(speed));
  write_file_atomically(folder / "trace.json", kTrace);
}

}  // namespace

TEST_CASE("a run is simulated as its file says") {
  const schedule::SimulatedRun run = simulated_run(run_options());
  CHECK(run.iterations == 9);
  CHECK(run.prompts == 4);
  CHECK(run.samples_per_prompt == 2);
  CHECK(run.epochs == 3);
  CHECK(run.mini_batches == 2);
  CHECK(run.max_tokens_per_micro_batch == 333);
  CHECK(run.max_new_tokens == 1000);
  CHECK(run.engine.max_sequences == 6);
  CHECK(run.engine.max_tokens_per_step == 77);
  CHECK(run.seed == 5);
}

TEST_CASE("costs are found again in what a serial run has logged") {
  const TemporaryFolder folder;
  write_run(folder.path() / "all", run_options());
  const schedule::CostModel costs = calibrate(folder.path() / "all");
  CHECK(costs.decode.step_s == Approx(0.01));
  CHECK(costs.decode.sequence_s == Approx(0.001));
  CHECK(costs.decode.prefill_token_s == Approx(0.001));
  CHECK(costs.score.token_s == Approx(0.002));
  CHECK(costs.train.token_s == Approx(0.003));
  CHECK(costs.train.optimize_s == Approx(0.5));
  CHECK(costs.train.finish_s == Approx(0.002));
  CHECK(costs.train.publish_s == Approx(0.001));
  CHECK(costs.lengths.mean_tokens == Approx(29));
  CHECK(costs.lengths.sigma == 0);
  CHECK(costs.lengths.prompt_tokens == 7);

  write_run(folder.path() / "half", run_options(), 0.8);
  const auto sharing = calibrate_sharing(folder.path() / "all", folder.path() / "half");
  CHECK(sharing.generate == Approx(0.8));
  CHECK(sharing.train == Approx(0.8));
}

TEST_CASE("lengths are fitted through rounding and clipping") {
  const auto free = fit_lengths(100, 50, 1 << 20);
  CHECK(free.mean_tokens == Approx(100).epsilon(0.01));
  CHECK(free.sigma == Approx(std::sqrt(std::log(1.25))).epsilon(0.01));
  const auto equal = fit_lengths(12, 0, 64);
  CHECK(equal.mean_tokens == 12);
  CHECK(equal.sigma == 0);
  // A limit at twice the mean cuts the tail off: before that the mean and the spread were larger.
  const auto clipped = fit_lengths(100, 50, 200);
  CHECK(clipped.mean_tokens > 100);
  CHECK(clipped.sigma > free.sigma);
}

TEST_CASE("what is missing for a calibration is named") {
  const TemporaryFolder folder;
  CHECK_THROWS_WITH(calibrate(folder.path() / "none"), ContainsSubstring("none/config.resolved.yaml"));
  RunOptions streamed = run_options();
  streamed.schedule.mode = ScheduleMode::kStreamed;
  write_run(folder.path(), streamed);
  CHECK_THROWS_WITH(calibrate(folder.path()),
                    ContainsSubstring("schedule.mode") && ContainsSubstring("serial"));
  write_run(folder.path(), run_options());
  write_file_atomically(folder.path() / "metrics.jsonl", "{\"stage\": \"sft\", \"step\": 1}\n");
  CHECK_THROWS_WITH(calibrate(folder.path()), ContainsSubstring("no iteration of the stage ppo"));
  write_file_atomically(folder.path() / "metrics.jsonl", "{\"stage\": \"ppo\", \"step\": 1}\n");
  CHECK_THROWS_WITH(calibrate(folder.path()), ContainsSubstring("no number 'rollout/mean_length'"));
  write_run(folder.path(), run_options());
  write_file_atomically(folder.path() / "trace.json", "[]");
  CHECK_THROWS_WITH(calibrate(folder.path()),
                    ContainsSubstring("no span 'optimize'") && ContainsSubstring("run.trace_iterations"));
  write_file_atomically(folder.path() / "trace.json", "{");
  CHECK_THROWS_WITH(calibrate(folder.path()), ContainsSubstring("trace of a finished run"));
}

TEST_CASE("costs of a data sheet, by hand") {
  const schedule::Accelerator device{"test", 100e12, 2e12, 3e11, 5e10, 8};
  const schedule::ModelShape model{1e9, 10, 1000, 500};
  schedule::Efficiency all;
  all.train_flops = all.forward_flops = all.memory = all.network = 1;
  all.step_s = 0.001;
  const auto costs = schedule::roofline_costs(device, model, {100, 300, 0.5}, all);
  CHECK(costs.decode.weights_s == Approx(1e-3));        // 2 GB at 2 TB/s
  CHECK(costs.decode.sequence_s == Approx(2e-5));       // 2 GFLOP at 100 TFLOP/s
  CHECK(costs.decode.context_token_s == Approx(1e-8));  // 2 x 2 x 10 x 500 bytes
  // 4 x 10 x 1000 x 200 operations of attention.
  CHECK(costs.score.token_s == Approx((2e9 + 8e6) / 100e12));
  CHECK(costs.train.token_s == Approx(3 * (2e9 + 8e6) / 100e12));
  CHECK(costs.train.optimize_s == Approx(0.015));
  CHECK(costs.network.all_reduce_s(8) == Approx(2 * 7.0 / 8 * 2e9 / 3e11 + 3e-5));
  CHECK(costs.lengths.sigma == 0.5);
  CHECK(schedule::find_accelerator("h100-80g").memory_bytes_per_s == 3.35e12);
  CHECK_THROWS_WITH(schedule::find_accelerator("abacus"),
                    ContainsSubstring("'abacus'") && ContainsSubstring("a100-80g, h100-80g"));
}

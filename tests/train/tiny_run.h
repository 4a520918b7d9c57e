#pragma once
// A run with every stage that takes a tenth of a second: a byte model of width 16 on three short JSONL files.

#include <atomic>
#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "rlhf/config/reader.h"
#include "rlhf/core/atomic_file.h"
#include "rlhf/train/pipeline.h"
#include "rlhf/train/run_directory.h"
#include "tests/data/temporary_folder.h"

namespace rlhf {

inline const char* kTinyRun = R"(
run: {name: tiny, seed: 3, export_stages: false}
threads: 1
model:
  new: {layers: 2, hidden_size: 16, heads: 2, kv_heads: 1, intermediate_size: 24, max_positions: 64, initial_std: 0.1}
data: {source: files, prompt_text: raw}
rewards: [{type: length, min_tokens: 2, max_tokens: 4, slope_tokens: 3}]
stages: [pretrain, sft, reward, ppo, eval]
pretrain: {max_steps: 3, examples_per_step: 2, optimizer: {learning_rate: 0.01}}
sft: {max_steps: 4, examples_per_step: 3, max_tokens_per_micro_batch: 40, optimizer: {learning_rate: 0.01}}
reward: {max_steps: 3, pairs_per_step: 3, max_tokens_per_micro_batch: 60, optimizer: {learning_rate: 0.01}}
rollout: {max_new_tokens: 8, max_sequences: 3, max_tokens_per_step: 24}
ppo:
  iterations: 4
  max_tokens_per_micro_batch: 50
  reward_model_weight: 0.5
  critic_init: reward
  algorithm:
    prompts_per_step: 3
    samples_per_prompt: 2
    epochs: 2
    mini_batches: 2
    kl: {coefficient: 0.1, controller: {kind: adaptive, target: 0.02, horizon: 20}}
    optimizer: {learning_rate: 0.003}
eval: {sampled_draws: 2}
)";

/// The folder of a test: data files and run directories.
class TinyData {
 public:
  TinyData() {
    std::string sft, pairs, prompts;
    const std::vector<std::string> subjects = {"rates", "bonds", "gold", "oil", "cash"};
    for (const std::string& subject : subjects) {
      sft += R"({"prompt": "what of )" + subject + R"(? ", "response": "sell )" + subject + "\"}\n";
      pairs +=
          R"({"prompt": "on )" + subject + R"(: ", "chosen": "sell", "rejected": "buy )" + subject + "\"}\n";
      prompts += R"({"prompt": "now )" + subject + R"(: ", "task": ")" +
                 (subject < "d" ? "first" : "second") + R"(", "reference": "sell"})" + "\n";
    }
    folder_.write("sft.jsonl", sft);
    folder_.write("pairs.jsonl", pairs);
    folder_.write("prompts.jsonl", prompts);
  }

  std::filesystem::path path(const std::string& name) const { return folder_.path() / name; }
  const TemporaryFolder& folder() const { return folder_; }

  /// The options of kTinyRun on these files, in run directory `name`, changed by `overrides`.
  RunOptions options(const std::string& name, std::vector<std::string> overrides = {}) const {
    config::LoadOptions load;
    load.overrides = {"run.dir=" + path(name).string(),
                      "data.sft_file=" + path("sft.jsonl").string(),
                      "data.pairs_file=" + path("pairs.jsonl").string(),
                      "data.held_out_pairs_file=" + path("pairs.jsonl").string(),
                      "data.prompts_file=" + path("prompts.jsonl").string(),
                      "data.eval_file=" + path("prompts.jsonl").string()};
    load.overrides.insert(load.overrides.end(), overrides.begin(), overrides.end());
    return config::parse<RunOptions>(kTinyRun, "tiny.yaml", load);
  }

 private:
  TemporaryFolder folder_;
};

/// Passes everything on to a run directory, remembers it, and asks the run to stop where the test says.
class Watcher : public RunObserver {
 public:
  explicit Watcher(RunObserver* inner) : inner_(inner) {}

  std::atomic<bool> stop{false};
  std::string stop_stage;      ///< "" = never, "*" = after every step
  std::int64_t stop_step = 0;  ///< of stop_stage
  std::map<std::pair<std::string, std::int64_t>, Metrics> steps;
  std::vector<std::string> messages;

  void message(LogLevel level, const std::string& text) override {
    messages.push_back(text);
    if (inner_) inner_->message(level, text);
  }
  void stage_begin(const std::string& stage, std::int64_t count) override {
    if (inner_) inner_->stage_begin(stage, count);
  }
  void step(const std::string& stage, std::int64_t step, std::int64_t count,
            const Metrics& metrics) override {
    steps[{stage, step}] = metrics;
    if (inner_) inner_->step(stage, step, count, metrics);
    if (stop_stage == "*" || (stage == stop_stage && step == stop_step)) stop = true;
  }
  void sample(const std::string& stage, const std::string& json) override {
    if (inner_) inner_->sample(stage, json);
  }
  void record(const std::string& stage, std::int64_t step, const Hashes& hashes) override {
    if (inner_) inner_->record(stage, step, hashes);
  }
  bool wants_records() const override { return inner_ && inner_->wants_records(); }
  void lane_event(const schedule::TraceEvent& event) override {
    if (inner_) inner_->lane_event(event);
  }

 private:
  RunObserver* inner_;
};

/// What one process did with a run.
struct Attempt {
  bool stopped = false;
  RunReport report;
  std::map<std::pair<std::string, std::int64_t>, Metrics> steps;
};

/// Starts or resumes a run as the program does, until it is done or stopped.
inline Attempt attempt(const RunOptions& options, PipelineSettings::Start start,
                       const std::string& stop_stage = "", std::int64_t stop_step = 0,
                       const Accelerator* accelerator = nullptr) {
  RunDirectory directory(options, start, {}, [](std::string_view) {});
  Watcher watcher(&directory);
  watcher.stop_stage = stop_stage;
  watcher.stop_step = stop_step;
  PipelineSettings settings;
  settings.start = start;
  settings.directory = directory.path();
  settings.stop = &watcher.stop;
  settings.fingerprint = directory.fingerprint();
  settings.accelerator = accelerator;
  Attempt result;
  try {
    Pipeline pipeline(options, settings, watcher);
    result.report = pipeline.run();
    directory.finish(result.report);
  } catch (const StageStopped&) {
    result.stopped = true;
  }
  result.steps = std::move(watcher.steps);
  return result;
}

/// Names and contents of the files below `folder`.
inline std::map<std::string, std::string> files_below(const std::filesystem::path& folder) {
  std::map<std::string, std::string> files;
  if (!std::filesystem::exists(folder)) return files;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(folder))
    if (entry.is_regular_file())
      files[std::filesystem::relative(entry.path(), folder).string()] = read_text_file(entry.path());
  return files;
}

/// Metrics that measure time, or memory and work that move with it, differ from run to run; all others may
/// not.
inline bool measures_time(const std::string& name) {
  return name.starts_with("time/") || name.starts_with("memory/") || name.starts_with("compute/") ||
         name.ends_with("_per_s") || name == "seconds";
}

}  // namespace rlhf

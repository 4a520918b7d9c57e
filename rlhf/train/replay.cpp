#include "rlhf/train/replay.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>

#include "rlhf/config/reader.h"
#include "rlhf/core/atomic_file.h"
#include "rlhf/core/error.h"
#include "rlhf/kernels/open_device.h"
#include "rlhf/train/pipeline.h"
#include "rlhf/train/run_directory.h"

namespace rlhf {
namespace {

using Json = nlohmann::ordered_json;

// What depends on the machine and its moment, not on the run.
bool is_reproducible(const std::string& name) {
  for (const char* group : {"time/", "memory/", "compute/"})
    if (name.starts_with(group)) return false;
  return !name.ends_with("_per_s") && name != "rollout/decode_steps";
}

// A number as metrics.jsonl has it: its digits tell every bit.
std::string number_text(double value) {
  return std::isfinite(value) ? Json(value).dump() : "null";
}

// The lines of the stage ppo, by step.
std::map<std::int64_t, Json> read_lines(const std::filesystem::path& file) {
  std::map<std::int64_t, Json> lines;
  std::istringstream text(read_text_file(file));
  for (std::string line; std::getline(text, line);) {
    Json json = Json::parse(line, nullptr, false);
    if (!json.is_object() || json.value("stage", "") != "ppo" || !json.contains("step")) continue;
    const std::int64_t step = json["step"];
    lines[step] = std::move(json);
  }
  return lines;
}

const Json& line_of(const std::map<std::int64_t, Json>& lines, std::int64_t step,
                    const std::filesystem::path& file) {
  const auto found = lines.find(step);
  if (found == lines.end())
    fail<IoError>(file.string(), ": has no record of step ", step, " of the stage ppo; it has ",
                  lines.size());
  return found->second;
}

class Recorder : public RunObserver {
 public:
  explicit Recorder(const LogSink& log) : log_(log) {}

  std::map<std::int64_t, Metrics> metrics;
  std::map<std::int64_t, Hashes> hashes;

  void message(LogLevel level, const std::string& text) override {
    if (log_) log_(level, text);
  }
  void step(const std::string& stage, std::int64_t step, std::int64_t, const Metrics& values) override {
    if (stage == "ppo") metrics[step] = values;
  }
  void record(const std::string& stage, std::int64_t step, const Hashes& values) override {
    if (stage == "ppo") hashes[step] = values;
  }
  bool wants_records() const override { return true; }

 private:
  const LogSink& log_;
};

// Everything that either side has.
std::vector<ReplayCheck> compare(const Json& recorded,
                                 const std::vector<std::pair<std::string, std::string>>& now) {
  std::vector<ReplayCheck> checks;
  for (const auto& [name, text] : now) {
    if (!is_reproducible(name)) continue;
    const auto found = recorded.find(name);
    std::string before = "none";
    if (found != recorded.end())
      before = found->is_string()   ? found->get<std::string>()
               : found->is_null()   ? "null"
               : found->is_number() ? number_text(found->get<double>())
                                    : found->dump();
    checks.push_back({name, before, text});
  }
  for (const auto& [name, value] : recorded.items()) {
    if (name == "stage" || name == "step" || !is_reproducible(name)) continue;
    if (std::ranges::find(checks, name, &ReplayCheck::name) == checks.end())
      checks.push_back({name, value.dump(), "none"});
  }
  return checks;
}

bool all_same(const std::vector<ReplayCheck>& checks) {
  return std::ranges::all_of(checks, &ReplayCheck::same);
}

std::vector<std::pair<std::string, std::string>> as_text(const Metrics& metrics) {
  std::vector<std::pair<std::string, std::string>> texts;
  for (const auto& [name, value] : metrics) texts.emplace_back(name, number_text(value));
  return texts;
}

RunOptions load_options(const std::filesystem::path& run_dir, std::int64_t step) {
  const auto file = run_dir / "config.resolved.yaml";
  auto options = config::load<RunOptions>(file);
  if (!options.has_stage(Stage::kPpo)) fail<ConfigError>(file.string(), ": stages has no ppo to replay");
  if (options.schedule.mode == ScheduleMode::kAsync)
    fail<ConfigError>(
        file.string(),
        ": schedule.mode async cannot be replayed: which weights a token is sampled with depends on "
        "timing; serial, streamed and one_step_off can");
  if (step < 1 || step > options.ppo.iterations)
    fail<ConfigError>("--step ", step, ": ppo.iterations of ", file.string(), " is ", options.ppo.iterations);
  return options;
}

}  // namespace

bool Replay::same() const {
  return all_same(hashes) && all_same(metrics);
}

Replay replay_step(const std::filesystem::path& run_dir, std::int64_t step, const LogSink& log) {
  const RunOptions options = load_options(run_dir, step);
  const auto metrics_file = run_dir / "metrics.jsonl", hashes_file = run_dir / "hashes.jsonl";
  const auto metrics = read_lines(metrics_file), hashes = read_lines(hashes_file);
  line_of(metrics, step, metrics_file);
  line_of(hashes, step, hashes_file);

  const OpenDevice device(options.device);
  PipelineSettings settings;
  settings.accelerator = device.accelerator();
  settings.start = PipelineSettings::Start::kResume;
  settings.directory = run_dir;
  settings.fingerprint = fingerprint_of(options);
  settings.replay_step = step;
  Recorder recorder(log);
  Pipeline pipeline(options, settings, recorder);
  pipeline.replay();

  Replay replay;
  replay.first = recorder.metrics.begin()->first;
  for (const auto& [number, values] : recorder.metrics) {
    const auto hash_checks = compare(line_of(hashes, number, hashes_file), recorder.hashes.at(number));
    const auto metric_checks = compare(line_of(metrics, number, metrics_file), as_text(values));
    if (number == step) {
      replay.hashes = hash_checks;
      replay.metrics = metric_checks;
    } else if (!all_same(hash_checks) || !all_same(metric_checks)) {
      replay.different_before.push_back(number);
    }
  }
  return replay;
}

}  // namespace rlhf

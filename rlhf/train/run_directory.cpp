#include "rlhf/train/run_directory.h"

#include <chrono>
#include <functional>

#include "rlhf/config/writer.h"
#include "rlhf/core/atomic_file.h"
#include "rlhf/core/error.h"

namespace rlhf {
namespace {

double seconds_of(auto time) {
  return std::chrono::duration<double>(time.time_since_epoch()).count();
}
double steady_seconds() {
  return seconds_of(std::chrono::steady_clock::now());
}
double wall_seconds() {
  return seconds_of(std::chrono::system_clock::now());
}

// FNV-1a, 64 bits: tells configurations apart, nothing more.
std::string hash_text(const std::string& text) {
  std::uint64_t hash = 0xcbf29ce484222325;
  for (unsigned char c : text) hash = (hash ^ c) * 0x100000001b3;
  std::ostringstream out;
  out << std::hex << hash;
  return out.str();
}

// What must stay equal for a checkpoint to continue the same run: everything but where it runs and how it is
// watched.
std::string fingerprint_of(RunOptions options) {
  options.run.dir.clear();
  options.run.checkpoint_every = 0;
  options.threads = 0;
  options.device = Device::kAuto;
  options.memory = {};
  return hash_text(config::to_yaml_document(config::Schema::of(options)));
}

}  // namespace

RunDirectory::RunDirectory(const RunOptions& options, PipelineSettings::Start start,
                           Progress::Options progress, Progress::Sink print)
    : path_(options.directory()),
      fingerprint_(fingerprint_of(options)),
      resumed_(start == PipelineSettings::Start::kResume),
      progress_(progress, steady_seconds, std::move(print)) {
  using Start = PipelineSettings::Start;
  const bool finished = std::filesystem::exists(path_ / "summary.json");
  const bool exists = std::filesystem::exists(path_ / "config.resolved.yaml");
  if (start == Start::kFresh && finished)
    fail<Error>(path_.string(),
                " holds a finished run; pass --overwrite to replace it, or set run.dir to another folder");
  if (start == Start::kFresh && exists)
    fail<Error>(path_.string(),
                " holds an unfinished run; pass --resume to continue it or --overwrite to replace it");
  if (start == Start::kResume && !exists) fail<Error>(path_.string(), " holds no run to resume");
  std::error_code code;
  if (start == Start::kOverwrite && exists)
    for (const char* entry :
         {"checkpoints", "samples", "tensorboard", "metrics.jsonl", "summary.json", "report.md"})
      std::filesystem::remove_all(path_ / entry, code);
  std::filesystem::create_directories(path_ / "samples", code);
  if (code) fail<IoError>(path_.string(), ": cannot be created: ", code.message());
  config::save_resolved(path_ / "config.resolved.yaml", options);
  tensorboard_ = std::make_unique<TensorBoardWriter>(path_ / "tensorboard", wall_seconds);
  if (!resumed_) metrics_.emplace(MetricsWriter::create(path_ / "metrics.jsonl"));
}

RunDirectory::~RunDirectory() = default;

void RunDirectory::finish(const RunReport& report) {
  write_run_report(path_, report);
}

void RunDirectory::message(LogLevel level, const std::string& text) {
  progress_.message(level == LogLevel::kWarning ? "warning: " + text : text);
}

void RunDirectory::stage_begin(const std::string& stage, std::int64_t steps) {
  stage_ = stage;
  stage_started_ = false;
  progress_.begin_stage(stage, steps, 0);
}

void RunDirectory::step(const std::string& stage, std::int64_t step, std::int64_t steps,
                        const Metrics& metrics) {
  if (!stage_started_) {
    // After a restart, lines of steps that are done again are dropped.
    if (resumed_) metrics_.emplace(MetricsWriter::resume(path_ / "metrics.jsonl", stage, step - 1));
    if (step > 1) progress_.begin_stage(stage, steps, step - 1);
    stage_started_ = true;
  }
  metrics_->write(stage, step, metrics);
  tensorboard_->write(stage, step, metrics);
  ProgressState state;
  state.iteration = step;
  const auto find = [&](const char* name) -> std::optional<double> {
    for (const auto& [key, value] : metrics)
      if (key == name) return value;
    return std::nullopt;
  };
  state.tokens_per_s = find("tokens_per_s");
  state.loss = find("loss");
  state.reward = find("reward/total");
  state.kl = find("objective/kl");
  progress_.update(state);
  if (step == steps) progress_.end_stage();
}

void RunDirectory::sample(const std::string& stage, const std::string& json) {
  auto found = samples_.find(stage);
  if (found == samples_.end())
    found = samples_
                .emplace(stage, std::ofstream(path_ / "samples" / (stage + ".jsonl"),
                                              resumed_ ? std::ios::app : std::ios::trunc))
                .first;
  found->second << json << "\n" << std::flush;
  if (!found->second) fail<IoError>((path_ / "samples" / (stage + ".jsonl")).string(), ": cannot write");
}

}  // namespace rlhf

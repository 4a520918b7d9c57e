#include "rlhf/train/run_directory.h"

#include <chrono>
#include <functional>
#include <nlohmann/json.hpp>
#include <sstream>

#include "rlhf/config/description.h"
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
RunOptions what_counts(RunOptions options) {
  options.run.dir.clear();
  options.run.checkpoint_every = 0;
  options.run.trace_iterations = 0;
  options.run.keep_checkpoints = options.run.record_hashes = false;
  options.threads = 0;
  options.device = Device::kAuto;
  options.memory = {};
  options.distributed = {};
  return options;
}

void require_same_run(const std::filesystem::path& folder, const RunOptions& options) {
  const auto before = config::load<RunOptions>(folder / "config.resolved.yaml");
  if (fingerprint_of(before) == fingerprint_of(options)) return;
  std::string list;
  for (const auto& difference : config::diff(what_counts(before), what_counts(options)))
    list += concat("\n  ", difference.path, ": ", difference.left, ", now ", difference.right);
  fail<Error>(folder.string(), " was started with another configuration:", list,
              "\nresume it with its config.resolved.yaml, or choose another run.dir");
}

}  // namespace

std::string fingerprint_of(const RunOptions& options) {
  RunOptions counted = what_counts(options);
  return hash_text(config::to_yaml_document(config::Schema::of(counted)));
}

RunDirectory::RunDirectory(const RunOptions& options, PipelineSettings::Start start,
                           Progress::Options progress, Progress::Sink print)
    : options_(options),
      start_(start),
      path_(options.directory()),
      fingerprint_(fingerprint_of(options)),
      progress_(progress, steady_seconds, std::move(print)) {
  using Start = PipelineSettings::Start;
  std::error_code code;
  const bool finished = std::filesystem::exists(path_ / "summary.json", code);
  const bool exists = std::filesystem::exists(path_ / "config.resolved.yaml", code);
  if (start == Start::kFresh && finished)
    fail<Error>(path_.string(),
                " holds a finished run; pass --overwrite to replace it, or set run.dir to another folder");
  if (start == Start::kFresh && exists)
    fail<Error>(path_.string(),
                " holds an unfinished run; pass --resume to continue it or --overwrite to replace it");
  if (start == Start::kResume && !exists) fail<Error>(path_.string(), " holds no run to resume");
  if (start == Start::kResume) require_same_run(path_, options);
  std::filesystem::create_directories(path_, code);
  if (code) fail<IoError>(path_.string(), ": cannot be created: ", code.message());
}

// Replaces what an overwritten run left, writes the resolved configuration and opens the files of the run.
void RunDirectory::open() {
  if (opened_) return;
  std::error_code code;
  if (start_ == PipelineSettings::Start::kOverwrite)
    for (const char* entry : {"checkpoints", "samples", "tensorboard", "metrics.jsonl", "hashes.jsonl",
                              "trace.json", "summary.json", "report.md"}) {
      std::filesystem::remove_all(path_ / entry, code);
      if (code) fail<IoError>((path_ / entry).string(), ": cannot be removed: ", code.message());
    }
  std::filesystem::create_directories(path_ / "samples", code);
  if (code) fail<IoError>(path_.string(), ": cannot be created: ", code.message());
  config::save_resolved(path_ / "config.resolved.yaml", options_);
  tensorboard_ = std::make_unique<TensorBoardWriter>(path_ / "tensorboard", wall_seconds);
  if (start_ != PipelineSettings::Start::kResume) {
    metrics_.emplace(MetricsWriter::create(path_ / "metrics.jsonl"));
    if (wants_records()) hashes_.emplace(MetricsWriter::create(path_ / "hashes.jsonl"));
  }
  if (options_.run.trace_iterations > 0)
    trace_ = std::make_unique<TraceWriter>(path_ / "trace.json", steady_seconds());
  opened_ = true;
}

RunDirectory::~RunDirectory() = default;

void RunDirectory::finish(const RunReport& report) {
  open();
  end_stage_span();
  write_run_report(path_, report);
}

void RunDirectory::message(LogLevel level, const std::string& text) {
  progress_.message(level == LogLevel::kWarning ? "warning: " + text : text);
}

void RunDirectory::stage_begin(const std::string& stage, std::int64_t steps) {
  open();
  end_stage_span();
  stage_begin_s_ = steady_seconds();
  stage_ = stage;
  stage_started_ = false;
  progress_.begin_stage(stage, steps);
}

void RunDirectory::step(const std::string& stage, std::int64_t step, std::int64_t steps,
                        const Metrics& metrics) {
  open();
  if (!stage_started_) {
    // After a restart, lines of steps that are done again are dropped.
    if (start_ == PipelineSettings::Start::kResume) {
      metrics_.emplace(MetricsWriter::resume(path_ / "metrics.jsonl", stage, step - 1));
      if (wants_records()) hashes_.emplace(MetricsWriter::resume(path_ / "hashes.jsonl", stage, step - 1));
    }
    stage_started_ = true;
  }
  metrics_->write(stage, step, metrics);
  tensorboard_->write(stage, step, metrics);
  trace_memory(step, metrics);
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

void RunDirectory::record(const std::string& stage, std::int64_t step, const Hashes& hashes) {
  hashes_->write_hashes(stage, step, hashes);
}

// Peaks of the tenants over an iteration, at its end.
void RunDirectory::trace_memory(std::int64_t step, const Metrics& metrics) {
  const std::lock_guard lock(trace_mutex_);
  if (!trace_ || first_traced_ < 0 || step - 1 - first_traced_ >= options_.run.trace_iterations) return;
  const std::string prefix = "memory/peak_bytes/";
  for (const auto& [name, value] : metrics)
    if (name.starts_with(prefix))
      trace_->counter("peak MiB: " + name.substr(prefix.size()), steady_seconds(), value / (1 << 20));
}

void RunDirectory::end_stage_span() {
  const std::lock_guard lock(trace_mutex_);
  if (trace_ && !stage_.empty()) trace_->span("stages", stage_, stage_begin_s_, steady_seconds());
  stage_.clear();
}

void RunDirectory::lane_event(const schedule::TraceEvent& event) {
  using schedule::Lane;
  using schedule::Task;
  constexpr double kShortestWait = 1e-5;  // less is the time between two tasks, not waiting
  const std::lock_guard lock(trace_mutex_);
  if (!trace_ || (event.waiting && event.end_s - event.begin_s < kShortestWait)) return;
  if (first_traced_ < 0) first_traced_ = event.iteration;
  if (event.iteration - first_traced_ >= options_.run.trace_iterations) return;
  std::string name = to_string(event.task);
  if (event.waiting) name = event.lane == Lane::kTrain ? "wait for samples" : "wait for weights";
  TraceWriter::Arguments arguments = {{"iteration", static_cast<double>(event.iteration + 1)},
                                      {"weights", static_cast<double>(event.version)}};
  if (event.num_samples > 0) arguments.emplace_back("samples", static_cast<double>(event.num_samples));
  trace_->span(concat(to_string(event.lane), " lane"), name, event.begin_s, event.end_s, arguments);
  if (event.waiting) return;
  if (event.task == Task::kFinish)
    trace_->counter("resident MiB", event.end_s, static_cast<double>(resident_bytes()) / (1 << 20));
  if (event.task == Task::kPublish)
    trace_->counter("weights version", event.end_s, static_cast<double>(event.iteration + 1));
}

// Samples of iterations before that of the next one: later ones belong to work that is done again.
std::string RunDirectory::kept_samples(const std::filesystem::path& file, const std::string& next) const {
  std::string kept;
  if (start_ != PipelineSettings::Start::kResume || !std::filesystem::exists(file)) return kept;
  const auto iteration = [](const std::string& line) {
    const auto json = nlohmann::json::parse(line, nullptr, false);
    return json.is_object() ? json.value("iteration", INT64_MAX) : INT64_MAX;
  };
  std::istringstream lines(read_text_file(file));
  for (std::string line; std::getline(lines, line);)
    if (iteration(line) < iteration(next)) kept += line + "\n";
  return kept;
}

void RunDirectory::sample(const std::string& stage, const std::string& json) {
  open();
  const std::filesystem::path file = path_ / "samples" / (stage + ".jsonl");
  auto found = samples_.find(stage);
  if (found == samples_.end()) {
    write_file_atomically(file, kept_samples(file, json));
    found = samples_.emplace(stage, std::ofstream(file, std::ios::app)).first;
  }
  found->second << json << "\n" << std::flush;
  if (!found->second) fail<IoError>(file.string(), ": cannot write (disk full?)");
}

}  // namespace rlhf

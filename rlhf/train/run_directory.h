#pragma once

#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "rlhf/report/metrics_writer.h"
#include "rlhf/report/progress.h"
#include "rlhf/report/tensorboard_writer.h"
#include "rlhf/report/trace_writer.h"
#include "rlhf/train/pipeline.h"
#include "rlhf/train/run_options.h"
#include "rlhf/train/stage.h"

namespace rlhf {

/// Hash of a resolved configuration without what a resumed run may change.
std::string fingerprint_of(const RunOptions& options);

/// The folder of a run: config.resolved.yaml, metrics.jsonl, hashes.jsonl, samples/*.jsonl, checkpoints/,
/// tensorboard/, trace.json, summary.json, report.md. Watches a pipeline, writes its metrics and shows
/// progress.
class RunDirectory : public RunObserver {
 public:
  /// Creates the folder. Nothing that is there already is changed before the first stage begins (or a step or
  /// the end is reported): a run that cannot load its model or data leaves an earlier run as it was.
  /// @throws Error when it holds a finished or unfinished run and `start` is kFresh, or a run of another
  /// configuration (which names the keys) and `start` is kResume; IoError when it cannot be made.
  RunDirectory(const RunOptions& options, PipelineSettings::Start start, Progress::Options progress,
               Progress::Sink print);
  ~RunDirectory() override;

  const std::filesystem::path& path() const { return path_; }
  /// Hash of the resolved configuration, for checkpoints.
  const std::string& fingerprint() const { return fingerprint_; }
  /// Writes summary.json and report.md.
  void finish(const RunReport& report);

  void message(LogLevel level, const std::string& text) override;
  void stage_begin(const std::string& stage, std::int64_t steps) override;
  void step(const std::string& stage, std::int64_t step, std::int64_t steps, const Metrics& metrics) override;
  void sample(const std::string& stage, const std::string& json) override;
  void record(const std::string& stage, std::int64_t step, const Hashes& hashes) override;
  bool wants_records() const override { return options_.run.record_hashes; }
  void lane_event(const schedule::TraceEvent& event) override;

 private:
  void open();
  void end_stage_span();
  void trace_memory(std::int64_t step, const Metrics& metrics);
  std::string kept_samples(const std::filesystem::path& file, const std::string& next) const;

  RunOptions options_;
  PipelineSettings::Start start_;
  std::filesystem::path path_;
  std::string fingerprint_;
  bool opened_ = false;
  std::optional<MetricsWriter> metrics_, hashes_;
  std::unique_ptr<TensorBoardWriter> tensorboard_;
  std::map<std::string, std::ofstream> samples_;
  std::mutex trace_mutex_;  ///< lanes report while a step does
  std::unique_ptr<TraceWriter> trace_;
  std::int64_t first_traced_ = -1;  ///< iteration that the lanes began with; -1 = none yet
  double stage_begin_s_ = 0;
  Progress progress_;
  std::string stage_;
  bool stage_started_ = false;
};

}  // namespace rlhf

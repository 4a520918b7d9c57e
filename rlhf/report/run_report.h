#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "rlhf/report/interval.h"

namespace rlhf {

/// What one model did on the held-out cases of one task.
struct StageScore {
  std::string stage;                   ///< "base", "sft", "ppo" ...
  double score = 0;                    ///< mean rule reward
  Interval interval;                   ///< 95 %, of the mean
  std::size_t count = 0;               ///< cases
  std::optional<double> accuracy;      ///< share of cases with full reward
  std::optional<double> well_formed;   ///< share of responses in the demanded form
  std::optional<double> mean_tokens;   ///< response length
  std::optional<double> reward_model;  ///< mean reward-model score
  std::optional<double> kl;            ///< mean KL per response to the policy before PPO, nats
};

/// A constant answer scored on the same cases.
struct BaselineScore {
  std::string name;
  double score = 0;
};

/// Two stages on the same cases; `interval` is that of the mean difference, paired by case.
struct StageComparison {
  std::string before;
  std::string after;
  double difference = 0;
  Interval interval;
};

struct TaskReport {
  std::string task;
  std::vector<StageScore> stages;  ///< in the order in which they ran
  std::vector<BaselineScore> baselines;
  std::vector<StageComparison> comparisons;
};

/// One prompt with the responses of several stages.
struct Transcript {
  std::string task;
  std::string prompt;
  std::string gold;
  struct Response {
    std::string stage;
    std::string text;
    double score = 0;
  };
  std::vector<Response> responses;
};

/// Seconds of one phase of one stage.
struct PhaseTime {
  std::string stage;
  std::string phase;
  double seconds = 0;
};

/// Everything that `summary.json` and `report.md` show.
struct RunReport {
  std::string name;
  std::string version;
  std::uint64_t seed = 0;
  std::vector<std::pair<std::string, double>>
      metrics;  ///< top-level results, e.g. "greedy"; not finite becomes null
  std::vector<TaskReport> tasks;
  std::vector<PhaseTime> timings;
  std::uint64_t peak_memory_bytes = 0;                              ///< of the process; 0 when not known
  std::vector<std::pair<std::string, std::uint64_t>> memory_bytes;  ///< peak by tenant
  std::vector<std::string> warnings;                                ///< e.g. reward hacking
  std::vector<Transcript> transcripts;                              ///< report.md only
};

/// True when a proxy reward rose between two stages of a task while the rule reward fell: the sign of reward
/// hacking.
bool proxy_diverges(const StageScore& before, const StageScore& after);

/// Returns the JSON text of summary.json; keys are described in docs/reference/metrics.md.
std::string to_summary_json(const RunReport& report);
/// Returns the Markdown text of report.md.
std::string to_report_markdown(const RunReport& report);
/// Writes `summary.json` and `report.md` into a run directory, each atomically, the summary last: a run with
/// a summary is complete. @throws IoError.
void write_run_report(const std::filesystem::path& run_folder, const RunReport& report);

}  // namespace rlhf

#include "rlhf/report/run_report.h"

#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "rlhf/core/atomic_file.h"
#include "rlhf/core/error.h"
#include "rlhf/report/progress.h"

namespace rlhf {
namespace {

using nlohmann::ordered_json;

ordered_json number(double value) {
  return std::isfinite(value) ? ordered_json(value) : ordered_json(nullptr);
}

void add_optional(ordered_json& object, const char* key, const std::optional<double>& value) {
  if (value) object[key] = number(*value);
}

ordered_json to_json(const StageScore& stage) {
  ordered_json out{{"score", number(stage.score)},
                   {"low", number(stage.interval.low)},
                   {"high", number(stage.interval.high)},
                   {"count", stage.count}};
  add_optional(out, "accuracy", stage.accuracy);
  add_optional(out, "well_formed", stage.well_formed);
  add_optional(out, "mean_tokens", stage.mean_tokens);
  add_optional(out, "reward_model", stage.reward_model);
  add_optional(out, "kl", stage.kl);
  return out;
}

ordered_json to_json(const TaskReport& task) {
  ordered_json out{{"stages", ordered_json::object()}, {"baselines", ordered_json::object()}};
  for (const StageScore& stage : task.stages) out["stages"][stage.stage] = to_json(stage);
  for (const BaselineScore& baseline : task.baselines)
    out["baselines"][baseline.name] = number(baseline.score);
  auto comparisons = ordered_json::array();
  for (const StageComparison& pair : task.comparisons) {
    comparisons.push_back({{"before", pair.before},
                           {"after", pair.after},
                           {"difference", number(pair.difference)},
                           {"low", number(pair.interval.low)},
                           {"high", number(pair.interval.high)}});
  }
  out["comparisons"] = std::move(comparisons);
  return out;
}

std::string fixed(double value, int digits) {
  if (!std::isfinite(value)) return "n/a";
  char buffer[64];
  std::snprintf(buffer, sizeof buffer, "%.*f", digits, value);
  return buffer;
}

std::string fixed(const std::optional<double>& value, int digits) {
  return value ? fixed(*value, digits) : "-";
}

// Text of a model inside a table cell: no pipe, no line break.
std::string cell(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '|') {
      out += "\\|";
    } else if (c == '\n' || c == '\r') {
      out += ' ';
    } else {
      out += c;
    }
  }
  return out;
}

void append_task(const TaskReport& task, std::string& out) {
  out += concat("\n### ", task.task, "\n\n");
  out +=
      "| stage | score | 95 % interval | cases | full reward | well formed | mean tokens | reward model | KL "
      "|\n";
  out += "|---|---|---|---|---|---|---|---|---|\n";
  for (const StageScore& s : task.stages) {
    out += concat("| ", s.stage, " | ", fixed(s.score, 3), " | ", fixed(s.interval.low, 3), " to ",
                  fixed(s.interval.high, 3), " | ", s.count, " | ", fixed(s.accuracy, 3), " | ",
                  fixed(s.well_formed, 3), " | ", fixed(s.mean_tokens, 1), " | ", fixed(s.reward_model, 3),
                  " | ", fixed(s.kl, 4), " |\n");
  }
  for (const BaselineScore& baseline : task.baselines) {
    out +=
        concat("| always the ", baseline.name, " answer | ", fixed(baseline.score, 3), " | | | | | | | |\n");
  }
  for (const StageComparison& pair : task.comparisons) {
    const bool better = pair.interval.low > 0, worse = pair.interval.high < 0;
    out += concat("\n", pair.after, " against ", pair.before, ": ", fixed(pair.difference, 3), " (",
                  fixed(pair.interval.low, 3), " to ", fixed(pair.interval.high, 3), "), ",
                  better  ? "better beyond the interval"
                  : worse ? "worse beyond the interval"
                          : "no difference beyond the interval",
                  ".\n");
  }
}

void append_transcripts(const std::vector<Transcript>& transcripts, std::string& out) {
  if (transcripts.empty()) return;
  out += "\n## Transcripts\n";
  for (const Transcript& transcript : transcripts) {
    out += concat("\n**", transcript.task, "**: ", cell(transcript.prompt),
                  "\n\n| | response | reward |\n|---|---|---|\n");
    for (const Transcript::Response& response : transcript.responses) {
      out +=
          concat("| ", response.stage, " | ", cell(response.text), " | ", fixed(response.score, 2), " |\n");
    }
    out += concat("| gold | ", cell(transcript.gold), " | |\n");
  }
}

void append_costs(const RunReport& report, std::string& out) {
  if (!report.timings.empty()) {
    out += "\n## Time\n\n| stage | phase | seconds |\n|---|---|---|\n";
    double total = 0;
    for (const PhaseTime& time : report.timings) {
      out += concat("| ", time.stage, " | ", time.phase, " | ", fixed(time.seconds, 2), " |\n");
      total += time.seconds;
    }
    out += concat("\nTogether ", format_duration(total), ".\n");
  }
  constexpr double kMebibyte = 1024.0 * 1024.0;
  if (report.peak_memory_bytes == 0 && report.memory_bytes.empty()) return;
  out += "\n## Memory\n\n| | peak MiB |\n|---|---|\n";
  if (report.peak_memory_bytes > 0) {
    out +=
        concat("| process | ", fixed(static_cast<double>(report.peak_memory_bytes) / kMebibyte, 0), " |\n");
  }
  for (const auto& [tenant, bytes] : report.memory_bytes) {
    out += concat("| ", tenant, " | ", fixed(static_cast<double>(bytes) / kMebibyte, 1), " |\n");
  }
}

}  // namespace

bool proxy_diverges(const StageScore& before, const StageScore& after) {
  return before.reward_model && after.reward_model && *after.reward_model > *before.reward_model &&
         after.interval.high < before.interval.low;
}

std::string to_summary_json(const RunReport& report) {
  ordered_json out{{"name", report.name}, {"version", report.version}, {"seed", report.seed}};
  out["metrics"] = ordered_json::object();
  for (const auto& [name, value] : report.metrics) out["metrics"][name] = number(value);
  out["tasks"] = ordered_json::object();
  for (const TaskReport& task : report.tasks) out["tasks"][task.task] = to_json(task);
  out["timings_s"] = ordered_json::object();
  for (const PhaseTime& time : report.timings)
    out["timings_s"][time.stage][time.phase] = number(time.seconds);
  out["peak_memory_bytes"] = report.peak_memory_bytes;
  out["memory_bytes"] = ordered_json::object();
  for (const auto& [tenant, bytes] : report.memory_bytes) out["memory_bytes"][tenant] = bytes;
  out["warnings"] = report.warnings;
  return out.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

std::string to_report_markdown(const RunReport& report) {
  std::string out = concat("# ", report.name, "\n\nrlhf.cpp ", report.version, ", seed ", report.seed, ".\n");
  for (const std::string& warning : report.warnings) out += concat("\n> Warning: ", warning, "\n");
  if (!report.metrics.empty()) {
    out += "\n## Results\n\n| | |\n|---|---|\n";
    for (const auto& [name, value] : report.metrics)
      out += concat("| ", name, " | ", fixed(value, 4), " |\n");
  }
  if (!report.tasks.empty()) out += "\n## Tasks (held-out cases)\n";
  for (const TaskReport& task : report.tasks) append_task(task, out);
  append_transcripts(report.transcripts, out);
  append_costs(report, out);
  return out;
}

void write_run_report(const std::filesystem::path& run_folder, const RunReport& report) {
  write_file_atomically(run_folder / "report.md", to_report_markdown(report));
  write_file_atomically(run_folder / "summary.json", to_summary_json(report));
}

}  // namespace rlhf

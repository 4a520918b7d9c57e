#include "rlhf/train/simulation.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>

#include "rlhf/config/reader.h"
#include "rlhf/core/atomic_file.h"
#include "rlhf/core/error.h"
#include "rlhf/schedule/batching_rules.h"

namespace rlhf {
namespace {

using schedule::quantile;

// Columns of metrics.jsonl, stage ppo.
class PpoMetrics {
 public:
  explicit PpoMetrics(const std::filesystem::path& run_dir) : file_(run_dir / "metrics.jsonl") {
    std::istringstream text(read_text_file(file_));
    for (std::string line; std::getline(text, line);) {
      auto json = nlohmann::json::parse(line, nullptr, false);
      if (json.is_object() && json.value("stage", "") == "ppo") lines_.push_back(std::move(json));
    }
    if (lines_.empty()) fail<IoError>(file_.string(), ": holds no iteration of the stage ppo");
  }

  std::vector<double> values(const char* name) const {
    std::vector<double> values;
    for (const auto& line : lines_) {
      const auto found = line.find(name);
      if (found == line.end() || !found->is_number())
        fail<IoError>(file_.string(), ": an iteration has no number '", name, "'");
      values.push_back(found->get<double>());
    }
    return values;
  }
  double median(const char* name) const { return quantile(values(name), 0.5); }
  double mean(const char* name) const {
    const auto all = values(name);
    double sum = 0;
    for (const double value : all) sum += value;
    return sum / static_cast<double>(all.size());
  }

 private:
  std::filesystem::path file_;
  std::vector<nlohmann::json> lines_;
};

// Median seconds of the spans of a task.
class TaskSpans {
 public:
  explicit TaskSpans(const std::filesystem::path& run_dir) : file_(run_dir / "trace.json") {
    const auto events = nlohmann::json::parse(read_text_file(file_), nullptr, false);
    if (!events.is_array()) fail<IoError>(file_.string(), ": expected the trace of a finished run");
    for (const auto& event : events)
      if (event.is_object() && event.value("ph", "") == "X")
        seconds_[event.value("name", "")].push_back(event.value("dur", 0.0) * 1e-6);
  }
  double median(schedule::Task task) const {
    const auto found = seconds_.find(to_string(task));
    if (found == seconds_.end())
      fail<IoError>(file_.string(), ": has no span '", to_string(task),
                    "'; run with run.trace_iterations above 0");
    return quantile(found->second, 0.5);
  }

 private:
  std::filesystem::path file_;
  std::map<std::string, std::vector<double>> seconds_;
};

RunOptions load_serial_run(const std::filesystem::path& run_dir) {
  const auto file = run_dir / "config.resolved.yaml";
  auto options = config::load<RunOptions>(file);
  if (options.schedule.mode != ScheduleMode::kSerial)
    fail<ConfigError>(file.string(),
                      ": schedule.mode: costs are calibrated from a run in mode serial, where no "
                      "task runs beside another");
  return options;
}

// Seconds a step and seconds a row, not negative, that explain the seconds of all iterations best.
std::pair<double, double> fit_decode(const std::vector<double>& seconds, const std::vector<double>& steps,
                                     const std::vector<double>& rows) {
  double ss = 0, sr = 0, rr = 0, st = 0, rt = 0;
  for (std::size_t i = 0; i < seconds.size(); ++i) {
    ss += steps[i] * steps[i];
    sr += steps[i] * rows[i];
    rr += rows[i] * rows[i];
    st += steps[i] * seconds[i];
    rt += rows[i] * seconds[i];
  }
  const double determinant = ss * rr - sr * sr;
  // Iterations that are all alike do not tell the two apart.
  if (determinant <= 1e-9 * ss * rr) return {0, rt / rr};
  const double step_s = (st * rr - rt * sr) / determinant, row_s = (rt * ss - st * sr) / determinant;
  if (row_s < 0) return {st / ss, 0};
  if (step_s < 0) return {0, rt / rr};
  return {step_s, row_s};
}

double median_ratio(const std::vector<double>& seconds, const std::vector<double>& work) {
  std::vector<double> ratios;
  for (std::size_t i = 0; i < work.size(); ++i) ratios.push_back(seconds[i] / work[i]);
  return quantile(ratios, 0.5);
}

// What the iterations computed.
struct Work {
  std::vector<double> rows, trained_rows;  // [iterations]
  double optimizer_steps = 0;              // of an iteration

  Work(const ppo::PpoOptions& algorithm, const std::vector<double>& lengths, double prompt_tokens) {
    const std::size_t samples = algorithm.prompts_per_step * algorithm.samples_per_prompt;
    const std::size_t parts = std::min(algorithm.mini_batches, samples);
    const auto epochs = static_cast<double>(algorithm.epochs);
    optimizer_steps = epochs * static_cast<double>(parts);
    const double prompt_rows = static_cast<double>(algorithm.prompts_per_step) * prompt_tokens;
    // A prompt is computed once in each mini-batch that has a sample of it.
    const bool whole_groups =
        schedule::mini_batch_unit(algorithm.prompts_per_step, algorithm.samples_per_prompt, parts) ==
        algorithm.samples_per_prompt;
    const auto prompt_passes =
        static_cast<double>(whole_groups ? 1 : std::min(parts, algorithm.samples_per_prompt));
    for (const double length : lengths) {
      const double response_rows = static_cast<double>(samples) * length;
      rows.push_back(response_rows + prompt_rows);
      trained_rows.push_back(epochs * (response_rows + prompt_passes * prompt_rows));
    }
  }
};

schedule::DecodeCosts decode_costs(const PpoMetrics& metrics, const std::vector<double>& rows) {
  const auto seconds = metrics.values("time/generate_s"), steps = metrics.values("rollout/decode_steps");
  const auto [step_s, row_s] = fit_decode(seconds, steps, rows);
  std::vector<double> fitted;
  for (std::size_t i = 0; i < rows.size(); ++i) fitted.push_back(step_s * steps[i] + row_s * rows[i]);
  // The fit says how steps and rows compare; the median how long they take, whatever else the machine did.
  const double scale = median_ratio(seconds, fitted);
  schedule::DecodeCosts costs;
  costs.step_s = scale * step_s;
  costs.sequence_s = costs.prefill_token_s = scale * row_s;
  return costs;
}

// Mean and standard deviation after rounding and clipping, by summing over the normal density.
std::pair<double, double> clipped_moments(const schedule::LengthModel& lengths, std::int64_t max_tokens) {
  double weights = 0, sum = 0, squares = 0;
  const double mu = std::log(lengths.mean_tokens) - lengths.sigma * lengths.sigma / 2;
  for (double z = -4; z <= 4; z += 0.01) {
    const double weight = std::exp(-z * z / 2);
    const double tokens =
        std::clamp(std::round(std::exp(mu + lengths.sigma * z)), 1.0, static_cast<double>(max_tokens));
    weights += weight;
    sum += weight * tokens;
    squares += weight * tokens * tokens;
  }
  const double mean = sum / weights;
  return {mean, std::sqrt(std::max(0.0, squares / weights - mean * mean))};
}

}  // namespace

schedule::SimulatedRun simulated_run(const RunOptions& options) {
  const ppo::PpoOptions& algorithm = options.ppo.algorithm;
  schedule::SimulatedRun run;
  run.iterations = options.ppo.iterations;
  run.prompts = algorithm.prompts_per_step;
  run.samples_per_prompt = algorithm.samples_per_prompt;
  run.epochs = algorithm.epochs;
  run.mini_batches = algorithm.mini_batches;
  run.max_tokens_per_micro_batch = static_cast<std::size_t>(options.ppo.max_tokens_per_micro_batch);
  run.needs_whole_batch = !options.whole_batch_key().empty();
  run.max_new_tokens = options.rollout.max_new_tokens;
  run.engine = {options.rollout.max_sequences, step_tokens(options.rollout.max_tokens_per_step, false)};
  run.seed = options.run.seed;
  return run;
}

schedule::LengthModel fit_lengths(double mean, double stddev, std::int64_t max_tokens) {
  schedule::LengthModel lengths;
  lengths.mean_tokens = mean;
  lengths.sigma = std::sqrt(std::log1p(stddev * stddev / (mean * mean)));
  // What clipping takes away is given back until the moments agree, or nearly: a mean close to the limit has
  // no such distribution.
  for (int round = 0; round < 100 && stddev > 0; ++round) {
    const auto [clipped_mean, clipped_stddev] = clipped_moments(lengths, max_tokens);
    lengths.mean_tokens = std::clamp(lengths.mean_tokens * mean / clipped_mean, 1.0, 1048576.0);
    if (clipped_stddev > 0) lengths.sigma = std::clamp(lengths.sigma * stddev / clipped_stddev, 0.01, 3.0);
  }
  return lengths;
}

schedule::CostModel calibrate(const std::filesystem::path& run_dir) {
  const RunOptions options = load_serial_run(run_dir);
  const PpoMetrics metrics(run_dir);
  const TaskSpans spans(run_dir);
  const auto lengths = metrics.values("rollout/mean_length");
  const double prompt_tokens = std::max(1.0, std::round(metrics.mean("rollout/prompt_tokens")));
  const Work work(options.ppo.algorithm, lengths, prompt_tokens);

  schedule::CostModel costs;
  costs.lengths = fit_lengths(metrics.mean("rollout/mean_length"), metrics.mean("rollout/length_stddev"),
                              options.rollout.max_new_tokens);
  costs.lengths.prompt_tokens = prompt_tokens;
  costs.decode = decode_costs(metrics, work.rows);
  costs.score.token_s = median_ratio(metrics.values("time/score_s"), work.rows);
  costs.train.optimize_s = spans.median(schedule::Task::kOptimize);
  costs.train.finish_s = spans.median(schedule::Task::kFinish);
  costs.train.publish_s = spans.median(schedule::Task::kPublish);
  std::vector<double> passes_s = metrics.values("time/train_s");
  for (double& seconds : passes_s)
    seconds = std::max(0.0, seconds - work.optimizer_steps * costs.train.optimize_s);
  costs.train.token_s = median_ratio(passes_s, work.trained_rows);
  return costs;
}

schedule::SharingModel calibrate_sharing(const std::filesystem::path& all_threads,
                                         const std::filesystem::path& half_threads) {
  load_serial_run(all_threads);
  load_serial_run(half_threads);
  const PpoMetrics all(all_threads), half(half_threads);
  const auto speed = [&](const char* name) {
    return std::clamp(all.median(name) / half.median(name), 0.01, 100.0);
  };
  return {speed("time/generate_s"), speed("time/train_s")};
}

}  // namespace rlhf

#include <algorithm>
#include <iomanip>
#include <iostream>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>

#include "rlhf/cli/prediction.h"
#include "rlhf/cli/verbs.h"
#include "rlhf/config/writer.h"
#include "rlhf/core/error.h"
#include "rlhf/train/model_shape.h"
#include "rlhf/train/simulation.h"

namespace rlhf::cli {
namespace {

using schedule::Lane;
using schedule::Simulation;

struct SimulateArguments {
  std::string file;
  CostArguments costs;
  std::vector<std::string> set, modes;
  std::vector<std::size_t> devices = {1};
  std::int64_t iterations = 0;
  std::size_t prompts_per_device = 0;
  bool print_rates = false, json = false;
};

// ---- output ----

nlohmann::ordered_json to_json(const std::string& mode, const Simulation& s) {
  nlohmann::ordered_json out = {
      {"mode", mode},
      {"devices", s.devices},
      {"iteration_s", schedule::quantile(s.iteration_s, 0.5)},
      {"iteration_p90_s", schedule::quantile(s.iteration_s, 0.9)},
      {"samples_per_s", s.samples_per_s()},
      {"tokens_per_s", s.tokens_per_s()},
      {"generate_utilisation", s.utilisation(Lane::kGenerate)},
      {"train_utilisation", s.utilisation(Lane::kTrain)},
      {"idle", s.idle_s / s.device_s()},
  };
  for (const schedule::Wait wait : schedule::kAllWaits) out["waits"][to_string(wait)] = s.waiting(wait);
  out["mean_staleness"] = s.mean_staleness();
  double tokens = 0;
  for (const std::int64_t count : s.tokens_by_staleness) tokens += static_cast<double>(count);
  out["staleness"] = nlohmann::ordered_json::array();
  for (const std::int64_t count : s.tokens_by_staleness)
    out["staleness"].push_back(static_cast<double>(count) / tokens);
  out["all_iterations_s"] = s.iteration_s;
  return out;
}

void print_json(const std::vector<ModePredictions>& rows) {
  nlohmann::ordered_json out = nlohmann::ordered_json::array();
  for (const ModePredictions& row : rows) {
    nlohmann::ordered_json entry = {{"devices", row.devices},
                                    {"recommended", row.modes[schedule::recommend(row.results)]}};
    for (std::size_t i = 0; i < row.modes.size(); ++i)
      entry["modes"].push_back(to_json(row.modes[i], row.results[i]));
    out.push_back(std::move(entry));
  }
  std::cout << out.dump(1) << "\n";
}

std::string staleness(const Simulation& s) {
  double tokens = 0;
  for (const std::int64_t count : s.tokens_by_staleness) tokens += static_cast<double>(count);
  std::string text;
  for (std::size_t i = 0; i < s.tokens_by_staleness.size(); ++i)
    text +=
        concat(i == 0 ? "" : " ", i, ":", percent(static_cast<double>(s.tokens_by_staleness[i]) / tokens));
  return text;
}

void print_line(const std::vector<std::string>& cells) {
  constexpr std::array kWidths = {8, 13, 12, 9, 11, 11, 9, 7, 6, 9, 9, 9, 9, 8};
  std::ostringstream out;
  for (std::size_t i = 0; i < cells.size(); ++i)
    out << std::left << std::setw(i < kWidths.size() ? kWidths[i] : 0) << cells[i];
  std::cout << out.str() << "\n";
}

void print_table(const std::vector<ModePredictions>& rows) {
  print_line({"devices", "mode", "iteration_s", "p90", "samples/s", "tokens/s", "generate", "train", "idle",
              "samples", "weights", "slowest", "network", "reward", "staleness"});
  for (const ModePredictions& row : rows) {
    for (std::size_t i = 0; i < row.modes.size(); ++i) {
      const Simulation& s = row.results[i];
      std::vector<std::string> cells = {std::to_string(row.devices),
                                        row.modes[i],
                                        number(schedule::quantile(s.iteration_s, 0.5)),
                                        number(schedule::quantile(s.iteration_s, 0.9)),
                                        number(s.samples_per_s()),
                                        number(s.tokens_per_s()),
                                        percent(s.utilisation(Lane::kGenerate)),
                                        percent(s.utilisation(Lane::kTrain)),
                                        percent(s.idle_s / s.device_s())};
      for (const schedule::Wait wait :
           {schedule::Wait::kSamples, schedule::Wait::kWeights, schedule::Wait::kSlowestRank,
            schedule::Wait::kAllReduce, schedule::Wait::kReward})
        cells.push_back(percent(s.waiting(wait)));
      cells.push_back(staleness(s));
      print_line(cells);
    }
    std::cout << row.devices << (row.devices == 1 ? " device: " : " devices: ")
              << row.modes[schedule::recommend(row.results)]
              << " is the least stale mode within 5 % of the most samples a second\n";
  }
}

ModePredictions predict(const SimulateArguments& a, const RunOptions& options,
                        const schedule::CostModel& costs, std::size_t devices) {
  schedule::SimulatedRun run = simulated_run(options);
  if (a.iterations > 0) run.iterations = a.iterations;
  if (a.prompts_per_device > 0) run.prompts = a.prompts_per_device * devices;
  return predict_modes(options, run, costs, devices, a.modes);
}

void simulate(const SimulateArguments& a) {
  std::optional<ModelConfig> shaped;
  if (!a.costs.shape.empty()) shaped = shaped_model(a.costs.shape).config;
  const RunOptions options = load_run(a.file, a.set);
  schedule::ModelShape model;
  if (shaped) model = model_shape(*shaped, options.rollout.kv_dtype);
  schedule::CostModel costs = cost_model(a.costs, model);
  if (a.print_rates) {
    std::cout << config::to_yaml_document(config::Schema::of(costs));
    return;
  }
  std::vector<ModePredictions> rows;
  for (const std::size_t devices : a.devices) rows.push_back(predict(a, options, costs, devices));
  if (a.json)
    print_json(rows);
  else
    print_table(rows);
}

}  // namespace

void add_simulate(CLI::App& app) {
  auto* verb = app.add_subcommand(
      "simulate", "Predict iteration times, waits and staleness of a run in every mode, on many devices");
  auto a = std::make_shared<SimulateArguments>();
  for (const auto& [name, mode] : all_modes()) a->modes.push_back(name);
  verb->add_option("run", a->file, "Run file (YAML)")->required();
  verb->add_option("--set", a->set, "key.path=value, overrides the file; may be given often")
      ->take_all()
      ->allow_extra_args(false);
  const CostOptions costs = add_cost_options(*verb, a->costs);
  costs.accelerator->needs(costs.shape);
  costs.shape->needs(costs.accelerator);
  verb->add_option("--devices", a->devices, "Numbers of devices, e.g. 1,8,64")
      ->delimiter(',')
      ->check(CLI::Range(1, 1 << 20));
  verb->add_option("--modes", a->modes, "Modes to compare")
      ->delimiter(',')
      ->check(CLI::IsMember({"serial", "streamed", "one_step_off", "async"}));
  verb->add_option("--iterations", a->iterations, "Iterations; 0 = those of the run")
      ->check(CLI::Range(0, 1000000));
  verb->add_option("--prompts-per-device", a->prompts_per_device,
                   "Batches that grow with the devices; 0 = the run's batch is shared out")
      ->check(CLI::Range(0, 1 << 20));
  verb->add_flag("--print-rates", a->print_rates, "Print the costs as a rates file and simulate nothing");
  verb->add_flag("--json", a->json, "As JSON");
  verb->callback([a] { simulate(*a); });
}

}  // namespace rlhf::cli

#include <algorithm>
#include <iomanip>
#include <iostream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "rlhf/cli/verbs.h"
#include "rlhf/config/reader.h"
#include "rlhf/config/writer.h"
#include "rlhf/core/error.h"
#include "rlhf/schedule/roofline.h"
#include "rlhf/train/simulation.h"

namespace rlhf::cli {
namespace {

using schedule::Lane;
using schedule::Simulation;

struct Arguments {
  std::string file, rates, from, from_half, accelerator, shape;
  std::vector<std::string> set, modes;
  std::vector<std::size_t> devices = {1};
  std::int64_t iterations = 0;
  std::size_t prompts_per_device = 0;
  bool print_rates = false, json = false;
};

struct Row {
  std::size_t devices = 0;
  std::vector<std::string> modes;  ///< from least to most stale
  std::vector<Simulation> results;
};

/// Modes from least to most stale.
const std::vector<std::pair<std::string, ScheduleMode>>& all_modes() {
  static const std::vector<std::pair<std::string, ScheduleMode>> kModes = {
      {"serial", ScheduleMode::kSerial},
      {"streamed", ScheduleMode::kStreamed},
      {"one_step_off", ScheduleMode::kOneStepOff},
      {"async", ScheduleMode::kAsync}};
  return kModes;
}

schedule::ModelShape parse_shape(const std::string& text) {
  schedule::ModelShape shape;
  std::istringstream in(text);
  char comma[3] = {};
  in >> shape.parameters >> comma[0] >> shape.layers >> comma[1] >> shape.hidden >> comma[2] >>
      shape.kv_width;
  const bool positive = std::min({shape.parameters, shape.layers, shape.hidden, shape.kv_width}) > 0;
  if (!in || !in.eof() || std::string(comma, 3) != ",,," || !positive)
    fail<ConfigError>("--model-shape: got '", text,
                      "', expected PARAMETERS,LAYERS,HIDDEN,KV_WIDTH, for example 7.6e9,28,3584,512");
  return shape;
}

// Keys of the rates file win over what was calibrated or computed.
void assign_rates(schedule::CostModel& costs, const std::string& file) {
  if (!file.empty()) config::assign_yaml(config::Schema::of(costs), config::read_config_file(file), file, {});
}

schedule::CostModel cost_model(const Arguments& a) {
  schedule::CostModel costs;
  if (!a.from.empty()) {
    costs = calibrate(a.from);
    if (!a.from_half.empty()) costs.sharing = calibrate_sharing(a.from, a.from_half);
  }
  assign_rates(costs, a.rates);
  if (!a.accelerator.empty()) {
    const schedule::LengthModel lengths = costs.lengths;
    costs = roofline_costs(schedule::find_accelerator(a.accelerator), parse_shape(a.shape), lengths);
    assign_rates(costs, a.rates);
  }
  return costs;
}

RunOptions load_run(const Arguments& a) {
  config::LoadOptions load;
  load.overrides = a.set;
  return config::load<RunOptions>(a.file, load);
}

Row simulate_modes(const Arguments& a, RunOptions options, const schedule::CostModel& costs,
                   std::size_t devices) {
  schedule::SimulatedRun run = simulated_run(options);
  if (a.iterations > 0) run.iterations = a.iterations;
  if (a.prompts_per_device > 0) run.prompts = a.prompts_per_device * devices;
  Row row{devices, {}, {}};
  for (const auto& [name, mode] : all_modes()) {
    if (std::ranges::find(a.modes, name) == a.modes.end()) continue;
    options.schedule.mode = mode;
    row.modes.push_back(name);
    row.results.push_back(schedule::simulate(*options.schedule.make_policy(), run, costs, devices));
  }
  return row;
}

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

void print_json(const std::vector<Row>& rows) {
  nlohmann::ordered_json out = nlohmann::ordered_json::array();
  for (const Row& row : rows) {
    nlohmann::ordered_json entry = {{"devices", row.devices},
                                    {"recommended", row.modes[schedule::recommend(row.results)]}};
    for (std::size_t i = 0; i < row.modes.size(); ++i)
      entry["modes"].push_back(to_json(row.modes[i], row.results[i]));
    out.push_back(std::move(entry));
  }
  std::cout << out.dump(1) << "\n";
}

std::string percent(double share) {
  std::ostringstream out;
  out << std::fixed << std::setprecision(0) << 100 * share << "%";
  return out.str();
}

std::string number(double value) {
  std::ostringstream out;
  out << std::setprecision(3) << (value >= 1000 ? std::fixed : std::defaultfloat)
      << std::setprecision(value >= 1000 ? 0 : 3) << value;
  return out.str();
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

void print_table(const std::vector<Row>& rows) {
  print_line({"devices", "mode", "iteration_s", "p90", "samples/s", "tokens/s", "generate", "train", "idle",
              "samples", "weights", "slowest", "network", "reward", "staleness"});
  for (const Row& row : rows) {
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

void simulate(const Arguments& a) {
  schedule::CostModel costs = cost_model(a);
  const RunOptions options = load_run(a);
  if (a.print_rates) {
    std::cout << config::to_yaml_document(config::Schema::of(costs));
    return;
  }
  std::vector<Row> rows;
  for (const std::size_t devices : a.devices) rows.push_back(simulate_modes(a, options, costs, devices));
  if (a.json)
    print_json(rows);
  else
    print_table(rows);
}

}  // namespace

void add_simulate(CLI::App& app) {
  auto* verb = app.add_subcommand(
      "simulate", "Predict iteration times, waits and staleness of a run in every mode, on many devices");
  auto a = std::make_shared<Arguments>();
  for (const auto& [name, mode] : all_modes()) a->modes.push_back(name);
  verb->add_option("run", a->file, "Run file (YAML)")->required();
  verb->add_option("--set", a->set, "key.path=value, overrides the file; may be given often")
      ->take_all()
      ->allow_extra_args(false);
  verb->add_option("--rates", a->rates, "File of costs (YAML); its keys win over --from and --accelerator");
  auto* from = verb->add_option("--from", a->from, "Run directory of a finished serial run: its costs");
  verb->add_option("--from-half", a->from_half,
                   "The same run with half of the threads: costs of shared cores")
      ->needs(from);
  auto* shape = verb->add_option("--model-shape", a->shape,
                                 "PARAMETERS,LAYERS,HIDDEN,KV_WIDTH of the model on the accelerator");
  auto* accelerator =
      verb->add_option("--accelerator", a->accelerator, "Costs from the data sheet of a device")
          ->excludes(from)
          ->needs(shape);
  shape->needs(accelerator);
  std::vector<std::string> names;
  for (const auto& known : schedule::accelerators()) names.emplace_back(known.name);
  accelerator->check(CLI::IsMember(names));
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

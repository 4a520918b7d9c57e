#include "rlhf/cli/prediction.h"

#include <algorithm>
#include <iomanip>
#include <sstream>

#include "rlhf/cli/verbs.h"
#include "rlhf/config/reader.h"
#include "rlhf/train/simulation.h"

namespace rlhf::cli {
namespace {

// Keys of the rates file win over what was calibrated or computed.
void assign_rates(schedule::CostModel& costs, const std::string& file) {
  if (!file.empty()) config::assign_yaml(config::Schema::of(costs), config::read_config_file(file), file, {});
}

}  // namespace

CostOptions add_cost_options(CLI::App& verb, CostArguments& a) {
  CostOptions options;
  verb.add_option("--rates", a.rates, "File of costs (YAML); its keys win over --from and --accelerator");
  options.from = verb.add_option("--from", a.from, "Run directory of a finished serial run: its costs");
  verb.add_option("--from-half", a.from_half, "The same run with half of the threads: costs of shared cores")
      ->needs(options.from);
  options.shape = verb.add_option("--model-shape", a.shape,
                                  "PARAMETERS,LAYERS,HIDDEN,KV_WIDTH of the model, or its directory");
  std::vector<std::string> names;
  for (const auto& known : schedule::accelerators()) names.emplace_back(known.name);
  options.accelerator =
      verb.add_option("--accelerator", a.accelerator, "Costs from the data sheet of a device")
          ->excludes(options.from)
          ->check(CLI::IsMember(names));
  return options;
}

schedule::CostModel cost_model(const CostArguments& a, const schedule::ModelShape& model) {
  schedule::CostModel costs;
  if (!a.from.empty()) {
    costs = calibrate(a.from);
    if (!a.from_half.empty()) costs.sharing = calibrate_sharing(a.from, a.from_half);
  }
  assign_rates(costs, a.rates);
  if (!a.accelerator.empty()) {
    const schedule::LengthModel lengths = costs.lengths;
    costs = roofline_costs(schedule::find_accelerator(a.accelerator), model, lengths);
    assign_rates(costs, a.rates);
  }
  return costs;
}

const std::vector<std::pair<std::string, ScheduleMode>>& all_modes() {
  static const std::vector<std::pair<std::string, ScheduleMode>> kModes = {
      {"serial", ScheduleMode::kSerial},
      {"streamed", ScheduleMode::kStreamed},
      {"one_step_off", ScheduleMode::kOneStepOff},
      {"async", ScheduleMode::kAsync}};
  return kModes;
}

ModePredictions predict_modes(RunOptions options, const schedule::SimulatedRun& run,
                              const schedule::CostModel& costs, std::size_t devices,
                              const std::vector<std::string>& modes) {
  ModePredictions predictions{devices, {}, {}};
  for (const auto& [name, mode] : all_modes()) {
    if (std::ranges::find(modes, name) == modes.end()) continue;
    options.schedule.mode = mode;
    predictions.modes.push_back(name);
    predictions.results.push_back(schedule::simulate(*options.schedule.make_policy(), run, costs, devices));
  }
  return predictions;
}

RunOptions load_run(const std::string& file, const std::vector<std::string>& set) {
  config::LoadOptions load;
  load.overrides = set;
  return config::load<RunOptions>(file, load);
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

}  // namespace rlhf::cli

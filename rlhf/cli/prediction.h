#pragma once

#include <CLI/CLI.hpp>
#include <string>
#include <utility>
#include <vector>

#include "rlhf/schedule/roofline.h"
#include "rlhf/schedule/simulator.h"
#include "rlhf/train/run_options.h"

namespace rlhf::cli {

/// Where the costs of a prediction come from.
struct CostArguments {
  std::string rates, from, from_half, accelerator, shape;
};
/// The options of a verb that predicts.
struct CostOptions {
  CLI::Option *from = nullptr, *accelerator = nullptr, *shape = nullptr;
};
/// Adds --rates, --from, --from-half, --accelerator and --model-shape.
CostOptions add_cost_options(CLI::App& verb, CostArguments& arguments);
/// @param model on the accelerator; read only when one is named
schedule::CostModel cost_model(const CostArguments& arguments, const schedule::ModelShape& model);

/// Modes from least to most stale, by name.
const std::vector<std::pair<std::string, ScheduleMode>>& all_modes();

/// The modes that were simulated on some devices.
struct ModePredictions {
  std::size_t devices = 0;
  std::vector<std::string> modes;  ///< from least to most stale
  std::vector<schedule::Simulation> results;
};
/// @param modes names; they are taken from least to most stale
ModePredictions predict_modes(RunOptions options, const schedule::SimulatedRun& run,
                              const schedule::CostModel& costs, std::size_t devices,
                              const std::vector<std::string>& modes);

/// A run file with `--set` overrides.
RunOptions load_run(const std::string& file, const std::vector<std::string>& set);

/// "12%"; three significant digits below 1000.
std::string percent(double share);
std::string number(double value);

}  // namespace rlhf::cli

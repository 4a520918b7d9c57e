#include "rlhf/cli/plan_output.h"

#include <array>
#include <iomanip>
#include <iostream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "rlhf/train/ppo_iteration.h"

namespace rlhf::cli {
namespace {

using Json = nlohmann::ordered_json;
using schedule::Simulation;
using schedule::Task;

std::string streamed_text(const RunOptions& options) {
  if (const std::string key = options.whole_batch_key(); !key.empty())
    return concat("streamed overlaps scoring alone: ", key, " needs the whole batch");
  if (num_optimizer_steps(options.ppo.algorithm) > 1)
    return "streamed overlaps scoring, and training up to the first optimizer step of a batch";
  return "streamed overlaps scoring and training";
}

double phase_seconds(const Simulation& serial, Phase phase) {
  switch (phase) {
    case Phase::kGenerate:
      return serial.iteration_seconds(Task::kGenerate);
    case Phase::kScore:
      return serial.iteration_seconds(Task::kScore) + serial.iteration_seconds(Task::kAdvantage);
    case Phase::kTrain:
      return serial.iteration_seconds(Task::kTrain);
    case Phase::kOptimize:
      return serial.iteration_seconds(Task::kOptimize) + serial.iteration_seconds(Task::kFinish) +
             serial.iteration_seconds(Task::kPublish);
  }
  return 0;
}

// Least memory of a device in a mode.
std::uint64_t minimum_bytes(const Plan& plan, std::size_t mode) {
  RunOptions options = plan.options;
  options.schedule.mode = all_modes()[mode].second;
  return plan_memory(options, plan.setting).minimum_bytes();
}

void print_line(const std::string& name, const std::vector<std::string>& cells) {
  std::ostringstream out;
  out << "  " << std::left << std::setw(36) << name;
  for (const std::string& cell : cells) out << std::right << std::setw(12) << cell;
  std::cout << out.str() << "\n";
}

bool recomputes(const Plan& plan) {
  return recompute_of(plan.options.memory.recompute) == Recompute::kLayers;
}

void print_memory(const Plan& plan) {
  const bool fits = plan.memory.fits(plan.budget_bytes);
  std::cout << "memory of a device over an iteration, budget " << memory_text(plan.budget_bytes) << " of "
            << memory_text(plan.setting.machine_bytes) << (fits ? "" : " (least needs: it does not fit)")
            << (recomputes(plan) ? "; layers are computed again for backward (memory.recompute)" : "")
            << "\n";
  std::vector<std::string> header;
  for (const Phase phase : kAllPhases) header.emplace_back(to_string(phase));
  header.emplace_back("wanted");
  print_line("", header);
  const auto held = [&](Phase phase, std::size_t i) { return plan.memory.held(phase, plan.budget_bytes)[i]; };
  std::array<std::uint64_t, kAllPhases.size()> totals{};
  for (std::size_t i = 0; i < plan.memory.tenants.size(); ++i) {
    std::vector<std::string> cells;
    for (const Phase phase : kAllPhases) {
      cells.push_back(memory_text(held(phase, i)));
      totals[static_cast<std::size_t>(phase)] += held(phase, i);
    }
    cells.push_back(memory_text(plan.memory.tenants[i].peak_bytes()));
    print_line(plan.memory.tenants[i].name, cells);
  }
  std::vector<std::string> cells;
  for (const std::uint64_t total : totals) cells.push_back(memory_text(total));
  cells.push_back(memory_text(plan.memory.wanted_bytes()));
  print_line("all", cells);
}

void print_limits(const Plan& plan) {
  const BatchLimits& limits = plan.limits;
  std::cout << "what limits the batch\n";
  if (plan.options.has_stage(Stage::kPpo)) {
    std::cout << "  a token of a micro-batch takes " << memory_text(limits.token_bytes)
              << ": ppo.max_tokens_per_micro_batch is " << plan.options.ppo.max_tokens_per_micro_batch
              << ", ";
    if (limits.micro_batch_tokens)
      std::cout << "at most " << *limits.micro_batch_tokens << " fit\n";
    else
      std::cout << "none fits\n";
  }
  std::cout << "  a sample takes up to " << memory_text(limits.sequence_bytes)
            << " of cache: rollout.max_sequences is " << plan.options.rollout.max_sequences << ", at most "
            << limits.max_sequences << " stay in the cache; more take turns\n";
}

void print_times(const Plan& plan) {
  if (!plan.options.has_stage(Stage::kPpo)) return;
  std::cout << "time\n  " << streamed_text(plan.options) << "\n";
  if (!plan.predictions) {
    std::cout << "  no rates: --from RUN_DIR (a finished serial run) or --accelerator NAME predict times\n";
    return;
  }
  const auto& results = plan.predictions->results;
  std::cout << "  an iteration in mode serial:";
  for (const Phase phase : kAllPhases)
    std::cout << " " << to_string(phase) << " " << number(phase_seconds(results.front(), phase)) << " s";
  std::cout << "\n";
  for (std::size_t i = 0; i < results.size(); ++i)
    std::cout << "  " << std::left << std::setw(13) << plan.predictions->modes[i] << std::right
              << std::setw(8) << number(schedule::quantile(results[i].iteration_s, 0.5))
              << " s an iteration, " << std::setw(8) << number(results[i].samples_per_s()) << " samples/s, "
              << std::setw(5) << number(results[i].samples_per_s() / results.front().samples_per_s())
              << " x serial, at least " << memory_text(minimum_bytes(plan, i)) << "\n";
  std::cout << "  least stale within 5 % of the most samples a second: "
            << plan.predictions->modes[schedule::recommend(results)] << "\n";
}

}  // namespace

nlohmann::ordered_json to_json(const Plan& plan) {
  Json out = {{"fits", plan.memory.fits(plan.budget_bytes)},
              {"budget_bytes", plan.budget_bytes},
              {"minimum_bytes", plan.memory.minimum_bytes()},
              {"wanted_bytes", plan.memory.wanted_bytes()},
              {"devices", plan.setting.devices},
              {"sharding", to_string(plan.setting.sharding)},
              {"longest_prompt", plan.setting.longest_prompt},
              {"recompute", recomputes(plan) ? "layers" : "none"},
              {"assumptions", plan.assumptions}};
  for (std::size_t i = 0; i < plan.memory.tenants.size(); ++i) {
    const PlannedTenant& tenant = plan.memory.tenants[i];
    Json entry = {{"tenant", tenant.name}};
    for (const Phase phase : kAllPhases)
      entry[to_string(phase)] = {{"minimum", tenant.need(phase).minimum},
                                 {"wanted", tenant.need(phase).wanted},
                                 {"reclaimable", tenant.need(phase).reclaimable()},
                                 {"held", plan.memory.held(phase, plan.budget_bytes)[i]}};
    out["memory"].push_back(std::move(entry));
  }
  out["limits"] = {{"max_sequences", plan.limits.max_sequences},
                   {"bytes_per_sequence", plan.limits.sequence_bytes},
                   {"bytes_per_micro_batch_token", plan.limits.token_bytes}};
  if (plan.limits.micro_batch_tokens)
    out["limits"]["max_tokens_per_micro_batch"] = *plan.limits.micro_batch_tokens;
  if (plan.options.has_stage(Stage::kPpo)) {
    const std::string key = plan.options.whole_batch_key();
    out["streamed_overlaps_training"] = key.empty();
    if (!key.empty()) out["needs_whole_batch"] = key;
  }
  if (plan.predictions) {
    const auto& results = plan.predictions->results;
    for (const Phase phase : kAllPhases)
      out["phases_s"][to_string(phase)] = phase_seconds(results.front(), phase);
    for (std::size_t i = 0; i < results.size(); ++i)
      out["modes"].push_back({{"mode", plan.predictions->modes[i]},
                              {"iteration_s", schedule::quantile(results[i].iteration_s, 0.5)},
                              {"samples_per_s", results[i].samples_per_s()},
                              {"gain", results[i].samples_per_s() / results.front().samples_per_s()},
                              {"minimum_bytes", minimum_bytes(plan, i)},
                              {"mean_staleness", results[i].mean_staleness()}});
    out["recommended"] = plan.predictions->modes[schedule::recommend(results)];
  }
  for (const Advice& advice : plan.advice) {
    Json changes;
    for (const auto& [key, value] : advice.changes) changes[key] = value;
    out["advice"].push_back({{"changes", changes}, {"minimum_bytes", advice.minimum_bytes}});
  }
  return out;
}

void print_text(const Plan& plan) {
  print_memory(plan);
  print_limits(plan);
  print_times(plan);
  std::cout << "assumed\n";
  for (const std::string& assumption : plan.assumptions) std::cout << "  " << assumption << "\n";
}

}  // namespace rlhf::cli

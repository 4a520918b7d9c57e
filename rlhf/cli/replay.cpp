#include <algorithm>
#include <iostream>
#include <nlohmann/json.hpp>

#include "rlhf/cli/verbs.h"
#include "rlhf/core/error.h"
#include "rlhf/train/replay.h"

namespace rlhf::cli {
namespace {

struct ReplayArguments {
  std::string run_dir;
  std::int64_t step = 0;
  bool json = false;
};

nlohmann::ordered_json to_json(const std::vector<ReplayCheck>& checks) {
  nlohmann::ordered_json out = nlohmann::ordered_json::object();
  for (const ReplayCheck& check : checks)
    out[check.name] = {{"same", check.same()}, {"recorded", check.recorded}, {"replayed", check.replayed}};
  return out;
}

void print_json(const ReplayArguments& a, const Replay& replay) {
  const nlohmann::ordered_json out = {{"step", a.step},
                                      {"executed_from", replay.first},
                                      {"same", replay.same()},
                                      {"hashes", to_json(replay.hashes)},
                                      {"metrics", to_json(replay.metrics)},
                                      {"different_before", replay.different_before}};
  std::cout << out.dump(1) << "\n";
}

void print_text(const ReplayArguments& a, const Replay& replay) {
  std::cout << "step " << a.step << ", executed from step " << replay.first << " on\n";
  const auto print = [](const ReplayCheck& check) {
    std::cout << "  " << check.name << ": ";
    if (check.same())
      std::cout << "same (" << check.recorded << ")\n";
    else
      std::cout << "DIFFERENT: recorded " << check.recorded << ", replayed " << check.replayed << "\n";
  };
  for (const ReplayCheck& check : replay.hashes) print(check);
  for (const ReplayCheck& check : replay.metrics)
    if (!check.same()) print(check);
  const auto same = std::ranges::count_if(replay.metrics, &ReplayCheck::same);
  std::cout << "  metrics: " << same << " of " << replay.metrics.size() << " same, bit for bit\n";
  if (!replay.different_before.empty())
    std::cout << "  steps that differ before it begin with " << replay.different_before.front() << "\n";
}

void replay(const ReplayArguments& a) {
  const Replay replay = replay_step(a.run_dir, a.step, [](LogLevel level, std::string_view text) {
    if (level == LogLevel::kWarning) std::cerr << "warning: " << text << "\n";
  });
  if (a.json)
    print_json(a, replay);
  else
    print_text(a, replay);
  if (!replay.same()) throw ExitCode{1};
}

}  // namespace

void add_replay(CLI::App& app) {
  auto* verb = app.add_subcommand(
      "replay", "Execute a PPO iteration of a run again and compare samples, losses and weights bit for bit");
  auto a = std::make_shared<ReplayArguments>();
  verb->add_option("run_dir", a->run_dir, "Run directory")->required();
  verb->add_option("--step", a->step, "Iteration, from 1")->required();
  verb->add_flag("--json", a->json, "As JSON");
  verb->callback([a] { replay(*a); });
}

}  // namespace rlhf::cli

// What an embedding program brings: a run described in code, a reward of its own beside the built-in one, and
// an observer that sees every step. Trains a tiny model on the random walks, seconds on a CPU.
#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>

#include "rlhf/rlhf.h"

namespace {

// As in a run file; arguments of the program are further key=value overrides.
const char* const kRun = R"yaml(
run: {name: embed, export_stages: false}
model: {new: {vocabulary: letters, layers: 2, hidden_size: 64, heads: 4, kv_heads: 4, intermediate_size: 172, max_positions: 16, initial_std: 0.08}}
data: {source: random_walks, sft_cases: 500}
stages: [sft, ppo, eval]
sft: {epochs: 10, examples_per_step: 100, optimizer: {learning_rate: 1.0e-3}}
rollout: {max_new_tokens: 9, max_sequences: 80}
ppo:
  iterations: 15
  algorithm:
    preset: trl-rloo  # presets are part of the library
    prompts_per_step: 20
    samples_per_prompt: 4
    epochs: 2
    kl: {placement: none}
    optimizer: {learning_rate: 1.0e-3}
eval: {base: false}
)yaml";

/// A reward of our own: short walks, 0 at 10 letters and 1 at none.
class Brevity : public rlhf::RewardTerm {
 public:
  std::string_view name() const override { return "brevity"; }
  double score(const rlhf::ScoredSample& scored) const override {
    return 1.0 - static_cast<double>(std::min<std::size_t>(scored.text.size(), 10)) / 10.0;
  }
};

/// Prints what we care about of every PPO iteration.
class Watch : public rlhf::RunObserver {
 public:
  void stage_begin(const std::string& stage, std::int64_t steps) override {
    std::printf("%s: %lld steps\n", stage.c_str(), static_cast<long long>(steps));
  }
  void step(const std::string& stage, std::int64_t step, std::int64_t steps,
            const rlhf::Metrics& metrics) override {
    if (stage != "ppo" || (step % 5 != 0 && step != steps)) return;
    std::printf("  iteration %2lld  reward %.3f  brevity %.3f\n", static_cast<long long>(step),
                rlhf::metric(metrics, "reward/total", 0), rlhf::metric(metrics, "reward/brevity", 0));
  }
};

int run(int argc, char** argv) {
  rlhf::config::LoadOptions load;
  load.overrides.assign(argv + 1, argv + argc);
  const auto options = rlhf::config::parse<rlhf::RunOptions>(kRun, "embed", load);
  Watch watch;
  const rlhf::OpenDevice device(options.device);  // a GPU where there is one
  rlhf::PipelineSettings settings;
  settings.accelerator = device.accelerator();
  rlhf::Pipeline pipeline(options, settings, watch);
  pipeline.add_reward(std::make_unique<Brevity>(), {.weight = 0.1});
  const rlhf::RunReport report = pipeline.run();
  for (const rlhf::TaskReport& task : report.tasks)
    for (const rlhf::StageScore& stage : task.stages)
      std::printf("%s after %s: %.3f\n", task.task.c_str(), stage.stage.c_str(), stage.score);
  return pipeline.final_is_worse() ? 1 : 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const rlhf::ConfigError& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}

#include <algorithm>
#include <array>
#include <cmath>
#include <iostream>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "rlhf/cli/bench.h"
#include "rlhf/cli/model_arguments.h"
#include "rlhf/cli/prediction.h"
#include "rlhf/cli/verbs.h"
#include "rlhf/cli/work_package.h"
#include "rlhf/config/reader.h"
#include "rlhf/core/error.h"
#include "rlhf/core/random.h"
#include "rlhf/train/ppo_trainer.h"

namespace rlhf::cli {
namespace {

constexpr std::int64_t kWholeBatch = 1 << 20;  // rows of a step
constexpr std::size_t kNumProjections = 4;

struct BenchPipelineArguments : WorkArguments {
  std::string schedule = "serial", rung;
  std::int64_t batch = 32, ppo_epochs = 4, mini_batches = 0, group_size = 0;
  std::int64_t iterations = 3, warmup = 1, last_layers = 0;
  std::int64_t micro_batch_tokens = PpoStageOptions().max_tokens_per_micro_batch;
  int threads = 0;
  bool recompute = false;
  Device device = Device::kAuto;

  std::int64_t all_iterations() const { return warmup + iterations; }
  bool groups() const { return group_size > 0; }
  /// Rung of the throughput ladder, 0 to 4; 4 where none is asked for.
  int height() const { return rung.empty() ? 4 : rung[1] - '0'; }
  bool separate() const { return height() < 3; }
  /// The critic begins as the policy and reads the layers that neither trains.
  bool shares_trunk() const { return last_layers > 0; }
  TrainableOptions trainable() const {
    TrainableOptions options;
    if (!shares_trunk()) return options;
    options.mode = TrainableMode::kLastLayers;
    options.last_layers = last_layers;
    return options;
  }
  /// Whose prompt a rollout slot answers.
  std::uint64_t prompt_slot(std::uint64_t slot) const {
    return groups() ? slot / static_cast<std::uint64_t>(group_size) : slot;
  }
  std::int64_t length(const WorkPackage& package, std::uint64_t slot) const {
    return package.response_tokens(slot, length_mode(), response_tokens);
  }
};

// Keeps the metrics of every iteration.
class IterationMetrics : public RunObserver {
 public:
  void step(const std::string&, std::int64_t, std::int64_t, const Metrics& metrics) override {
    iterations.push_back(metrics);
  }
  std::vector<double> values(const std::string& name, std::int64_t first) const {
    std::vector<double> values;
    for (std::size_t i = static_cast<std::size_t>(first); i < iterations.size(); ++i)
      values.push_back(metric(iterations[i], name, 0));
    return values;
  }
  std::vector<Metrics> iterations;
};

// What GRPO is given for a reward: it must be cheap, and differ within groups.
class DistinctLetters : public RewardTerm {
 public:
  std::string_view name() const override { return "distinct_letters"; }
  double score(const ScoredSample& scored) const override {
    const std::set<char> letters(scored.text.begin(), scored.text.end());
    return static_cast<double>(letters.size()) / (1 + static_cast<double>(scored.text.size()));
  }
};

PpoStageOptions stage_options(const BenchPipelineArguments& arguments) {
  PpoStageOptions options;
  options.algorithm = config::load_preset<ppo::PpoOptions>(arguments.groups() ? "trl-grpo" : "trl-ppo");
  const std::int64_t group = std::max<std::int64_t>(1, arguments.group_size);
  options.algorithm.prompts_per_step = static_cast<std::size_t>(arguments.batch / group);
  options.algorithm.samples_per_prompt = static_cast<std::size_t>(group);
  options.algorithm.epochs = static_cast<std::size_t>(arguments.ppo_epochs);
  options.algorithm.mini_batches = static_cast<std::size_t>(arguments.mini_batches);
  options.iterations = arguments.all_iterations();
  options.max_tokens_per_micro_batch = arguments.micro_batch_tokens;
  options.reward_model_weight = arguments.groups() ? 0 : 1;
  options.critic_init = arguments.shares_trunk() ? CriticInit::kPolicy : CriticInit::kReward;
  options.prompt_order = ItemOrder::kGiven;
  options.samples_to_log = 0;
  options.padded_passes = arguments.separate();
  return options;
}

TrainableOptions frozen_model() {
  TrainableOptions frozen;
  frozen.mode = TrainableMode::kNone;
  return frozen;
}

// Sums of the trained weights with random signs: runs that learn the same move them alike.
std::array<double, kNumProjections> projections(const Parameters<float>& parameters) {
  std::array<double, kNumProjections> sums{};
  RandomStream random(7, 0);
  const std::span<const float> weights = parameters.trainable();
  std::uint64_t signs = 0;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    signs = i % (64 / kNumProjections) == 0 ? random.next_u64() : signs >> kNumProjections;
    for (std::size_t k = 0; k < kNumProjections; ++k)
      sums[k] += (signs >> k & 1) != 0 ? weights[i] : -weights[i];
  }
  return sums;
}

// The reward and the value model are read, and neither is needed as it stands in the file any longer than
// that.
LanguageModel load_scalar_model(const WorkPackage& work, const std::string& name, const ModelConfig& policy) {
  LanguageModel model = LanguageModel::load(work.folder / name, frozen_model());
  check_scalar_model(work, name, model.config(), policy);
  return model;
}

std::int64_t tokens_of(const WorkPackage& work, const BenchPipelineArguments& arguments,
                       std::int64_t iteration, bool with_prompts) {
  std::int64_t tokens = 0;
  for (std::int64_t i = 0; i < arguments.batch; ++i) {
    const auto slot = static_cast<std::uint64_t>(iteration * arguments.batch + i);
    tokens += arguments.length(work, slot);
    if (with_prompts)
      tokens += static_cast<std::int64_t>(work.prompt(arguments.prompt_slot(slot)).tokens.size());
  }
  return tokens;
}

// The lengths are the package's, not the policy's: an iteration that generated anything else measured other
// work.
void check_work_done(const WorkPackage& work, const BenchPipelineArguments& arguments,
                     const IterationMetrics& measured) {
  const auto lengths = measured.values("rollout/mean_length", 0);
  for (std::int64_t i = 0; i < arguments.all_iterations(); ++i) {
    const double expected =
        static_cast<double>(tokens_of(work, arguments, i, false)) / static_cast<double>(arguments.batch);
    if (std::abs(lengths.at(static_cast<std::size_t>(i)) - expected) > 1e-6)
      fail<InternalError>("bench pipeline: responses of iteration ", i, " have a mean length of ",
                          lengths[static_cast<std::size_t>(i)], ", the work package says ", expected);
  }
}

void print(const WorkPackage& work, const BenchPipelineArguments& arguments, const IterationMetrics& measured,
           const std::array<double, kNumProjections>& learned, const Compute<float>& compute) {
  const auto values = [&](const std::string& name) { return measured.values(name, arguments.warmup); };
  double seconds = 0, tokens = 0, response_tokens = 0;
  for (const double s : values("time/iteration_s")) seconds += s;
  for (std::int64_t i = arguments.warmup; i < arguments.all_iterations(); ++i) {
    tokens += static_cast<double>(tokens_of(work, arguments, i, true));
    response_tokens += static_cast<double>(tokens_of(work, arguments, i, false));
  }
  nlohmann::ordered_json out = {
      {"bench", "pipeline"},
      {"algorithm", arguments.groups() ? "trl-grpo" : "trl-ppo"},
      {"work", work.folder.string()},
      {"variant", work.variant},
      {"mode", arguments.mode},
      {"schedule", arguments.schedule},
      {"rung", arguments.rung},
      {"response_tokens", arguments.response_tokens},
      {"batch", arguments.batch},
      {"group_size", std::max<std::int64_t>(1, arguments.group_size)},
      {"ppo_epochs", arguments.ppo_epochs},
      {"mini_batches", arguments.mini_batches},
      {"micro_batch_tokens", arguments.micro_batch_tokens},
      {"recompute", arguments.recompute},
      {"last_layers", arguments.last_layers},
      {"iterations", arguments.iterations},
      {"warmup", arguments.warmup},
      {"samples_per_s", static_cast<double>(arguments.batch * arguments.iterations) / seconds},
      {"tokens_per_s", tokens / seconds},
      {"response_tokens_per_s", response_tokens / seconds}};
  const double decode = median(values("rollout/decode_tokens_per_s"));
  if (decode > 0) out["decode_tokens_per_s"] = decode;
  out["iteration_s"] = median(values("time/iteration_s"));
  out["generate_s"] = median(values("time/generate_s"));
  out["score_s"] = median(values("time/score_s"));
  out["train_s"] = median(values("time/train_s"));
  out["learned"] = learned;
  if (arguments.schedule != "serial") out["overlap"] = measured.values("time/overlap", 0);
  out["all_iterations_s"] = measured.values("time/iteration_s", 0);
  add_machine(out, compute);
  std::cout << out.dump() << "\n";
}

void bench_pipeline(BenchPipelineArguments arguments) {
  if (!arguments.rung.empty()) arguments.schedule = arguments.rung == "B4" ? "streamed" : "serial";
  if (arguments.mini_batches == 0)
    arguments.mini_batches = arguments.groups() ? 1 : std::min<std::int64_t>(4, arguments.batch);
  RLHF_CHECK(!arguments.groups() || arguments.batch % arguments.group_size == 0, "--batch ", arguments.batch,
             " is no multiple of --group-size ", arguments.group_size);
  RLHF_CHECK(arguments.mini_batches <= arguments.batch, "--mini-batches ", arguments.mini_batches,
             " exceeds --batch ", arguments.batch, ": every optimizer step needs a response");
  const WorkPackage work = load_work_package(arguments.work);
  const OpenDevice device(arguments.device);
  LanguageModel policy = LanguageModel::load(work.folder / "policy", arguments.trainable());
  const auto place = [&](std::optional<LanguageModel>& model) {
    if (model && device.accelerator()) model->parameters().place_on(*device.accelerator());
  };
  if (device.accelerator()) policy.parameters().place_on(*device.accelerator());
  check_fits(work, policy.config(), arguments.response_tokens);
  std::optional<LanguageModel> reward, value, separate_reference;
  std::optional<Parameters<float>> reference;
  if (!arguments.groups()) {
    reward = load_scalar_model(work, "reward", policy.config());
    if (!arguments.shares_trunk()) value = load_scalar_model(work, "value", policy.config());
    if (arguments.separate()) {
      if (arguments.shares_trunk())
        value = LanguageModel::load(work.folder / "policy", arguments.trainable());
      separate_reference = LanguageModel::load(work.folder / "policy", frozen_model());
    } else {
      reference = policy.parameters().frozen_copy();
    }
  }
  for (auto* model : {&reward, &value, &separate_reference}) place(*model);

  ThreadPool pool(arguments.threads);
  StageContext context(Compute<float>(pool, kernels::detect_cpu_isa(), device.accelerator()));
  IterationMetrics measured;
  context.observer = &measured;
  context.stop = &stop_flag();
  if (arguments.recompute) context.recompute = Recompute::kLayers;
  TaskData data;
  data.train_prompts = work.prompts;
  if (arguments.groups()) data.rules.add(std::make_unique<DistinctLetters>(), {});
  RolloutOptions rollout;
  rollout.max_new_tokens = arguments.response_tokens;
  rollout.max_sequences = arguments.batch;
  if (arguments.height() < 2) {
    rollout.decoding = arguments.height() == 0 ? Decoding::kUncached : Decoding::kStatic;
    rollout.max_tokens_per_step = kWholeBatch;
  }
  const PpoStageOptions options = stage_options(arguments);
  PpoSetting setting{data, rollout, options, context};
  for (const auto& [name, schedule_mode] : all_modes())
    if (name == arguments.schedule) setting.schedule.mode = schedule_mode;
  setting.adjust_request = [&](GenerationRequest& request, std::uint64_t slot) {
    work.fix_length(slot, arguments.length_mode(), arguments.response_tokens, request.stop);
  };
  FrozenModels frozen;
  if (!arguments.groups())
    frozen = {separate_reference ? &separate_reference->parameters() : &*reference, &reward->parameters(),
              value ? &value->parameters() : nullptr};
  const auto before = projections(policy.parameters());
  PpoTrainer trainer(policy, frozen, setting);
  if (!arguments.shares_trunk()) value.reset();  // the critic is a copy
  trainer.run();
  auto learned = projections(policy.parameters());
  for (std::size_t k = 0; k < kNumProjections; ++k) learned[k] -= before[k];
  check_work_done(work, arguments, measured);
  print(work, arguments, measured, learned, context.compute);
}

}  // namespace

void add_bench_pipeline(CLI::App& bench) {
  auto* verb = bench.add_subcommand(
      "pipeline",
      "Whole iterations of the preset trl-ppo or trl-grpo on a work package (see benchmarks/README.md)");
  auto a = std::make_shared<BenchPipelineArguments>();
  const auto at_least = [](std::int64_t low) { return CLI::Range(low, std::int64_t{1} << 20); };
  add_work_options(*verb, *a)->required();
  std::vector<std::string> modes;
  for (const auto& [name, schedule_mode] : all_modes()) modes.push_back(name);
  verb->add_option("--schedule", a->schedule, "schedule.mode of the run: what overlaps with generation")
      ->check(CLI::IsMember(modes));
  verb->add_option(
          "--rung", a->rung,
          "Step of the throughput ladder, all of which learn the same: B0 no K/V cache, padded, separate "
          "models; B1 with the cache; B2 with continuous batching; B3 with shared memory and ragged "
          "passes; B4 streamed. Empty = nothing is left out")
      ->check(CLI::IsMember({"B0", "B1", "B2", "B3", "B4"}));
  verb->add_option("--batch", a->batch, "Rollouts of an iteration")->check(CLI::Range(1, 4096));
  verb->add_option("--group-size", a->group_size, "Responses to a prompt: GRPO in place of PPO; 0 = PPO")
      ->check(CLI::Range(0, 4096));
  verb->add_option("--ppo-epochs", a->ppo_epochs, "Passes over a rollout batch")->check(at_least(1));
  verb->add_option("--mini-batches", a->mini_batches,
                   "Optimizer steps of a pass; 0 = 4, or one a response in smaller batches, or 1 for GRPO")
      ->check(at_least(0));
  verb->add_option("--iterations", a->iterations, "Measured iterations")->check(at_least(1));
  verb->add_option("--warmup", a->warmup, "Iterations before them; they use up rollout slots")
      ->check(at_least(0));
  verb->add_option("--micro-batch-tokens", a->micro_batch_tokens, "Tokens of one forward and backward pass")
      ->check(CLI::Range(2, 1 << 24));
  verb->add_option(
          "--last-layers", a->last_layers,
          "Train so many layers; reference and critic share the others with the policy, and the value "
          "model is not read; 0 = four full models")
      ->check(CLI::Range(0, 1024));
  verb->add_flag("--recompute", a->recompute,
                 "Training keeps the inputs of layers only, and computes the rest again");
  verb->add_option("--threads", a->threads, "0 = one per core")->check(CLI::Range(0, 1024));
  add_device_option(*verb, a->device);
  verb->callback([a] { bench_pipeline(*a); });
}

}  // namespace rlhf::cli

#include <algorithm>
#include <cmath>
#include <iostream>
#include <nlohmann/json.hpp>

#include "rlhf/cli/plan_output.h"
#include "rlhf/cli/verbs.h"
#include "rlhf/core/error.h"
#include "rlhf/train/build_task.h"
#include "rlhf/train/model_shape.h"
#include "rlhf/train/simulation.h"

namespace rlhf::cli {
namespace {

struct PlanArguments {
  std::string file, device_memory, numbers, shard;
  CostArguments costs;
  std::vector<std::string> set;
  std::int64_t devices = 1, longest_prompt = 0;
  bool json = false;
};

std::uint64_t device_bytes(const PlanArguments& a) {
  if (!a.device_memory.empty()) {
    const auto size = config::parse_memory_size(a.device_memory);
    if (!size || size->percent || size->bytes == 0)
      fail<ConfigError>("--device-memory: got '", a.device_memory, "', expected a size such as 80GiB");
    return size->bytes;
  }
  if (!a.costs.accelerator.empty()) return schedule::find_accelerator(a.costs.accelerator).memory_bytes;
  return machine_memory_bytes();
}

Sharding parse_sharding(const PlanArguments& a, const RunOptions& options) {
  if (a.shard.empty()) return a.devices > 1 ? options.distributed.sharding : Sharding::kNone;
  Sharding sharding = Sharding::kNone;
  for (const auto known : {Sharding::kOptimizer, Sharding::kGradients, Sharding::kWeights})
    if (a.shard == to_string(known)) sharding = known;
  if (sharding != Sharding::kNone && a.devices == 1)
    fail<ConfigError>("--shard ", a.shard,
                      " needs --devices above 1: on one device there is nothing to divide");
  return sharding;
}

void assume(Plan& plan, const std::string& text) {
  if (!text.empty()) plan.assumptions.push_back(text);
}

// The model's configuration and the longest prompt, from what is here or from what is said.
void read_model(const PlanArguments& a, Plan& plan) {
  PlanSetting& setting = plan.setting;
  const ModelSection& model = plan.options.model;
  setting.longest_prompt = a.longest_prompt;
  setting.teacher = teacher_config(plan.options);
  if (!a.costs.shape.empty()) {
    const ShapedModel shaped = shaped_model(a.costs.shape);
    setting.model = shaped.config;
    assume(plan, shaped.assumption);
  } else if (a.longest_prompt > 0 && !model.path.empty()) {
    setting.model = load_model_config(model.path);
  } else {
    const LanguageModel loaded = load_policy(plan.options);
    setting.model = loaded.config();
    if (a.longest_prompt > 0) return;
    const TaskData data = build_task(plan.options, loaded);
    setting.longest_prompt = std::max(longest_prompt(data.train_prompts), longest_prompt(data.eval_prompts));
  }
}

void check_context(const Plan& plan) {
  const std::int64_t context = plan.setting.model.max_positions;
  if (plan.setting.longest_prompt >= context)
    fail<ConfigError>("rollout.max_new_tokens: a prompt of ", plan.setting.longest_prompt,
                      " tokens (--longest-prompt or data) leaves no room in the model's context of ",
                      context);
}

void set_numbers(const PlanArguments& a, Plan& plan) {
  const bool half = a.numbers == "bf16" || (a.numbers.empty() && !a.costs.accelerator.empty());
  const bool fp8 = plan.options.rollout.kv_dtype == KvFormat::kFp8;
  if (fp8 && !half)
    fail<ConfigError>("rollout.kv_dtype: fp8 is for a GPU; give --accelerator or --numbers bf16");
  plan.setting.sizes = half ? NumberSizes::bf16() : NumberSizes::fp32();
  assume(plan, fp8    ? "bf16 weights and activations, fp8 cache; fp32 gradient, master weights and moments"
               : half ? "bf16 weights, cache and activations; fp32 gradient, master weights and moments"
                      : "all numbers in fp32, as this program has them on a CPU");
  if (a.devices == 1) return;
  static constexpr const char* kDivided[] = {"nothing", "optimizer state", "optimizer state and gradient",
                                             "optimizer state, gradient and weights"};
  assume(plan, concat(a.devices, " devices with a share of the prompts each; divided over them, not copied: ",
                      kDivided[static_cast<int>(plan.setting.sharding)]));
  if (plan.setting.sharding == Sharding::kWeights)
    assume(plan,
           "dividing weights is a prediction: runs divide the optimizer's state, and the gradient with "
           "distributed.sharding: zero2");
}

Plan make_plan(const PlanArguments& a) {
  Plan plan;
  plan.options = load_run(a.file, a.set);
  const auto prompts = static_cast<std::int64_t>(plan.options.ppo.algorithm.prompts_per_step);
  const bool ppo = plan.options.has_stage(Stage::kPpo);
  if (ppo && a.devices > prompts)
    fail<ConfigError>("--devices ", a.devices, " exceeds ppo.algorithm.prompts_per_step ", prompts,
                      ": every device needs a prompt");
  plan.setting.devices = a.devices;
  plan.setting.sharding = parse_sharding(a, plan.options);
  plan.setting.machine_bytes = device_bytes(a);
  const config::MemorySize& budget = plan.options.memory.budget;
  if (!budget.percent && budget.bytes > plan.setting.machine_bytes)
    fail<ConfigError>("memory.budget ", config::to_string(budget), " exceeds the device's ",
                      memory_text(plan.setting.machine_bytes), " (--device-memory)");
  plan.budget_bytes = budget.resolve(plan.setting.machine_bytes);
  read_model(a, plan);
  schedule::CostModel costs =
      cost_model(a.costs, model_shape(plan.setting.model, plan.options.rollout.kv_dtype));
  if (plan.setting.longest_prompt == 0) {
    plan.setting.longest_prompt = std::max<std::int64_t>(1, std::llround(costs.lengths.prompt_tokens));
    assume(plan, concat("the longest prompt has ", plan.setting.longest_prompt,
                        " tokens (--longest-prompt, or lengths.prompt_tokens of the rates)"));
  }
  check_context(plan);
  set_numbers(a, plan);
  const RunOptions asked = plan.options;
  plan.options = with_recompute_chosen(asked, plan.setting, plan.budget_bytes);
  plan.memory = plan_memory(plan.options, plan.setting);
  plan.limits = batch_limits(plan.options, plan.setting, plan.budget_bytes);
  if (!plan.memory.fits(plan.budget_bytes)) plan.advice = advise(asked, plan.setting, plan.budget_bytes);
  if (!ppo || (a.costs.from.empty() && a.costs.accelerator.empty() && a.costs.rates.empty())) return plan;
  assume(plan, concat("responses have ", number(costs.lengths.mean_tokens),
                      " tokens in the mean before rollout.max_new_tokens cuts them"));
  std::vector<std::string> modes;
  for (const auto& [name, mode] : all_modes()) modes.push_back(name);
  plan.predictions = predict_modes(plan.options, simulated_run(plan.options), costs,
                                   static_cast<std::size_t>(a.devices), modes);
  return plan;
}

void plan(const PlanArguments& a) {
  const Plan plan = make_plan(a);
  if (a.json)
    std::cout << to_json(plan).dump(1) << "\n";
  else
    print_text(plan);
  if (plan.memory.fits(plan.budget_bytes)) return;
  std::cerr << "rlhf: the budget of " << memory_text(plan.budget_bytes) << " is below the least need of "
            << memory_text(plan.memory.minimum_bytes()) << ":" << plan.memory.list_of_needs() << "\n";
  std::cerr << (plan.advice.empty() ? "nothing that was tried makes it fit\n"
                                    : "each of these makes it fit:\n");
  for (const Advice& advice : plan.advice)
    std::cerr << "  " << to_string(advice) << "  (" << memory_text(advice.minimum_bytes) << ")\n";
  throw ExitCode{1};
}

}  // namespace

void add_plan(CLI::App& app) {
  auto* verb = app.add_subcommand(
      "plan",
      "Memory of a run phase by phase, what limits its batch, predicted times, and what would make it fit");
  auto a = std::make_shared<PlanArguments>();
  verb->add_option("run", a->file, "Run file (YAML)")->required();
  verb->add_option("--set", a->set, "key.path=value, overrides the file; may be given often")
      ->take_all()
      ->allow_extra_args(false);
  add_cost_options(*verb, a->costs);
  verb->add_option("--device-memory", a->device_memory,
                   "Memory of a device, e.g. 80GiB; default: the accelerator's, or this machine's");
  verb->add_option("--devices", a->devices, "Devices that share a batch")->check(CLI::Range(1, 1 << 20));
  verb->add_option(
          "--shard", a->shard,
          "Divided over the devices; each word includes those before it (default: as distributed.sharding)")
      ->check(CLI::IsMember({"none", "optimizer", "gradients", "weights"}));
  verb->add_option("--numbers", a->numbers, "fp32 or bf16; default: bf16 with --accelerator")
      ->check(CLI::IsMember({"fp32", "bf16"}));
  verb->add_option("--longest-prompt", a->longest_prompt, "Tokens; default: that of the data")
      ->check(CLI::Range(1, 1 << 24));
  verb->add_flag("--json", a->json, "As JSON");
  verb->callback([a] { plan(*a); });
}

}  // namespace rlhf::cli

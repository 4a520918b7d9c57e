#include "rlhf/train/ppo_models.h"

#include <algorithm>

#include "rlhf/core/error.h"
#include "rlhf/kernels/accelerator.h"
#include "rlhf/train/memory_plan.h"

namespace rlhf {
namespace {

const ppo::OptimizerOptions& critic_optimizer_options(const ppo::PpoOptions& algorithm) {
  return algorithm.critic_update == ppo::CriticUpdate::kSeparate ? algorithm.critic_optimizer
                                                                 : algorithm.optimizer;
}

void check_inputs(const FrozenModels& frozen, const TaskData& data, const PpoStageOptions& options) {
  RLHF_CHECK(!data.train_prompts.empty(), "ppo: there are no prompts");
  const bool distils = options.algorithm.distillation.coefficient > 0;
  RLHF_CHECK(!distils || frozen.teacher,
             "ppo: algorithm.distillation has a coefficient but there is no teacher");
  // A teacher grades tokens: then there may be no other judge.
  const Judges judges{data, frozen.reward, options.reward_model_weight};
  if (!distils || options.reward_model_weight != 0) judges.check("ppo");
  RLHF_CHECK(!ppo::needs_reference(options.algorithm) || frozen.reference,
             "ppo: a KL to the reference is used but there is no reference model");
  RLHF_CHECK(!options.algorithm.dynamic_sampling.enabled || !data.rules.empty(),
             "ppo: dynamic_sampling looks at rule rewards, and there are none");
  RLHF_CHECK(!options.algorithm.advantage.greedy_baseline || !data.rules.normalizes(),
             "ppo: advantage.greedy_baseline compares scores that no reward term normalises");
}

}  // namespace

std::int64_t shared_trunk_layers(const DecoderWeights<float>& a, const DecoderWeights<float>& b) {
  if (a.embedding != b.embedding || a.positions != b.positions) return 0;
  const auto same = [](const LayerWeights<float>& x, const LayerWeights<float>& y) {
    return x.qkv.weight == y.qkv.weight && x.gate_up.weight == y.gate_up.weight && x.qkv.adapters.empty() &&
           y.qkv.adapters.empty() && x.out.adapters.empty() && y.out.adapters.empty() &&
           x.gate_up.adapters.empty() && y.gate_up.adapters.empty() && x.down.adapters.empty() &&
           y.down.adapters.empty();
  };
  std::int64_t layers = 0;
  while (layers < static_cast<std::int64_t>(std::min(a.layers.size(), b.layers.size())) &&
         same(a.layers[static_cast<std::size_t>(layers)], b.layers[static_cast<std::size_t>(layers)]))
    ++layers;
  return layers;
}

PpoModels::PpoModels(LanguageModel& policy_, const FrozenModels& frozen, const TaskData& data,
                     const RolloutOptions& rollout, const PpoStageOptions& options,
                     const StageContext& context, const ScheduleOptions& schedule)
    : policy(policy_),
      reference(ppo::needs_reference(options.algorithm) ? frozen.reference : nullptr),
      reward(options.reward_model_weight != 0 ? frozen.reward : nullptr),
      judges{data, reward, options.reward_model_weight},
      policy_optimizer(options.algorithm.optimizer, policy.parameters().num_trainable(), *context.collective,
                       context.moments),
      lengths(static_cast<double>(rollout.max_new_tokens)),
      pass(policy.config(), context.compute, context.recompute, &arena) {
  check_inputs(frozen, data, options);
  if (options.algorithm.distillation.coefficient > 0) teacher.emplace(*frozen.teacher, context.compute);
  const auto scheduling = schedule.make_policy();
  if (scheduling->max_staleness() > 0) snapshot.emplace(policy.parameters().snapshot());
  if (rollout.weights != WeightFormat::kFp32)
    rollout_weights.emplace(rollout.weights, generation_source(), policy.parameters().weights(),
                            context.compute);
  const Compute<float> generate_compute =
      scheduling->overlaps() ? open_generate_lane(context.compute) : context.compute;
  const Parameters<float>* base = frozen.critic_base;
  if (ppo::needs_critic(options.algorithm)) {
    ModelConfig config = policy.config();
    config.scalar_head = true;
    config.num_labels = 1;
    critic.emplace(config, policy.parameters().trainable_options(), base ? base : &policy.parameters());
    if (!base || !base->config().scalar_head) critic->initialise_score_head(context.seed);
    critic_optimizer.emplace(critic_optimizer_options(options.algorithm), critic->num_trainable(),
                             *context.collective, context.moments);
  }
  // An accelerator runs the trunk again sooner than its results come back from the host.
  trunk_cache_bytes = context.compute.accelerator() ? 0 : options.trunk_cache.resolve(machine_memory_bytes());
  const auto& weights = policy.parameters().weights();
  trunk_layers = options.padded_passes ? 0 : weights.first_trainable_layer;
  const Parameters<float>* value = critic ? &*critic : nullptr;
  for (const Parameters<float>* other : {reference, reward, value})
    if (other) trunk_layers = std::min(trunk_layers, shared_trunk_layers(weights, other->weights()));
  // A reward model and a critic also look behind the last token, which the generator never runs; and states
  // behind rounded weights are not those that the trainer's gradient belongs to.
  sampled_trunk = trunk_layers > 0 && trunk_cache_bytes > 0 && !reward && !critic && !rollout_weights;
  const Accelerator* accelerator = context.compute.accelerator();
  const std::int64_t kept_trunk = sampled_trunk ? trunk_layers : 0;
  const auto setting = memory_setting(frozen, data, rollout, options, context, schedule);
  arena.open(setting.arena_bytes(device_memory_bytes(context.compute)),
             RolloutEngine::slab_bytes(policy.config(), generate_compute, kept_trunk, rollout.kv_dtype),
             accelerator ? accelerator->memory : nullptr);
  engine = make_engine(policy, {rollout, data.train_prompts, generate_compute, context.max_blocks, kept_trunk,
                                &arena, rollout.kv_dtype});
  memory = std::make_unique<PpoMemory>(setting, policy.config(), *engine, pass, arena);
}

// A lane of its own: threads, and on an accelerator a queue, which goes first: its steps are short, and a
// train lane that waits for samples has nothing to do.
Compute<float> PpoModels::open_generate_lane(const Compute<float>& train) {
  generate_pool = std::make_unique<ThreadPool>(train.pool().num_threads());
  if (const Accelerator* device = train.accelerator()) {
    generate_queue = device->memory->new_queue(true);
    generate_device = *device;
    generate_device->memory = generate_queue.get();
  }
  return {*generate_pool, kernels::detect_cpu_isa(), generate_device ? &*generate_device : nullptr};
}

// Between two queues: the copy waits for steps that read the old weights, and the next step for the new ones.
// An optimizer's update of weights that generation reads itself comes when all samples are on the host.
void PpoModels::publish(const Compute<float>& compute) {
  DeviceMemory* const train_queue = generate_queue ? compute.accelerator()->memory : nullptr;
  if (train_queue) train_queue->wait_for(*generate_queue);
  if (snapshot) {
    snapshot->copy_learned(policy.parameters());
    copied_bytes_ += snapshot->num_trainable() * sizeof(float);
  }
  if (train_queue) generate_queue->wait_for(*train_queue);
  pack(compute);
  engine->forget_prefixes();
}

void PpoModels::pack(const Compute<float>& compute) {
  if (!rollout_weights) return;
  const Stopwatch watch;
  copied_bytes_ += rollout_weights->refresh(compute);
  pack_seconds_ += watch.seconds();
}

// What is there already, byte by byte, under the names of the plan.
PpoMemory::Setting PpoModels::memory_setting(const FrozenModels& frozen, const TaskData& data,
                                             const RolloutOptions& rollout, const PpoStageOptions& options,
                                             const StageContext& context,
                                             const ScheduleOptions& schedule) const {
  const std::int64_t longest = longest_prompt(data.train_prompts);
  PpoMemory::Setting setting;
  setting.budget_bytes = context.memory_budget;
  // The arena is taken at once there, and the driver, the products' library and small uploads need some, too.
  if (const Accelerator* device = context.compute.accelerator())
    setting.budget_bytes = std::min(setting.budget_bytes, device->bytes / 10 * 9);
  setting.least_blocks = block_need(rollout, longest).minimum;
  const auto hold = [&](const std::string& name, std::uint64_t bytes) {
    setting.fixed.emplace_back(name, bytes);
  };
  hold("policy weights", policy.parameters().owned_bytes());
  hold("policy gradient", policy.parameters().gradient_bytes());
  hold("policy optimizer", policy_optimizer.bytes_on(context.compute.accelerator()));
  if (critic) {
    hold("critic weights (own part)", critic->owned_bytes());
    hold("critic gradient", critic->gradient_bytes());
    hold("critic optimizer", critic_optimizer->bytes_on(context.compute.accelerator()));
  }
  if (frozen.reference) hold("reference (own part)", frozen.reference->owned_bytes());
  if (frozen.reward)
    hold("reward model (own part, gradient)", frozen.reward->owned_bytes() + frozen.reward->gradient_bytes());
  if (frozen.teacher) {
    hold("teacher weights", frozen.teacher->owned_bytes());
    hold("teacher's pass", teacher_pass_bytes(frozen.teacher->config(), rollout, options, longest));
  }
  if (snapshot) hold("generator's copy of the weights", snapshot->owned_bytes());
  if (rollout_weights) hold("generator's packed weights", rollout_weights->bytes());
  hold("generator's workspace",
       generator_workspace_bytes(policy.config(), rollout, activation_bytes_of(context.compute), longest));
  if (trunk_layers > 0 && trunk_cache_bytes > 0)
    hold("frozen layers' results of a batch",
         trunk_result_bytes({policy.config(), rollout, options, schedule}, longest, machine_memory_bytes()));
  return setting;
}

}  // namespace rlhf

#include "rlhf/train/memory_plan.h"

#include <algorithm>
#include <cstdio>
#include <numeric>

#include "rlhf/core/error.h"
#include "rlhf/kernels/ops.h"
#include "rlhf/memory/bytes_predictor.h"
#include "rlhf/model/parameters.h"
#include "rlhf/model/sequence_pass.h"
#include "rollout/engine/device_step.h"
#include "rollout/engine/rollout_engine.h"

namespace rlhf {
namespace {

using Need = PlannedTenant::Need;

std::uint64_t bytes_of(std::int64_t count, std::uint64_t size) {
  return static_cast<std::uint64_t>(count) * size;
}

// Most tokens of a pass, and most sequences in it: 16 tokens of its own or more in the mean. A sequence is
// never cut.
PassShape shape_of(std::int64_t tokens, std::int64_t sequences) {
  return PassShape::at_most(tokens, std::min(sequences, 1 + tokens / kernels::kBlockTokens));
}

PassShape largest_ppo_pass(const RolloutOptions& rollout, const PpoStageOptions& options,
                           std::int64_t longest_prompt) {
  const ppo::PpoOptions& algorithm = options.algorithm;
  return shape_of(std::max(options.max_tokens_per_micro_batch, longest_prompt + rollout.max_new_tokens),
                  static_cast<std::int64_t>(algorithm.prompts_per_step * algorithm.samples_per_prompt));
}

// Lists the tenants of a run, one function a part of it.
class Planner {
 public:
  Planner(const RunOptions& options, const PlanSetting& setting)
      : options_(options),
        setting_(setting),
        policy_(count_parameters(setting.model, options.model.trainable)),
        ppo_(options.has_stage(Stage::kPpo)) {
    ModelConfig scalar = setting.model;
    scalar.scalar_head = true;
    scalar.num_labels = 1;
    scalar_ = count_parameters(scalar, options.model.trainable);
    scalar.num_labels = static_cast<std::int64_t>(options.reward.reading.num_outputs());
    reward_ = count_parameters(scalar, options.model.trainable);
  }

  // K and V of a block, with the states behind the frozen layers where they are kept.
  std::uint64_t block_bytes() const { return block_bytes(options_.rollout.kv_dtype); }
  std::uint64_t block_bytes(KvFormat kv) const {
    const ModelConfig& model = setting_.model;
    if (kv == KvFormat::kFp8) return KvStore<Bfloat16>::block_bytes(model, model.num_layers, kv);
    const std::int64_t per_token =
        2 * model.kv_width() * model.num_layers + (samples_trunk() ? model.hidden_size : 0);
    return bytes_of(kernels::kBlockTokens * per_token, setting_.sizes.kv);
  }

  MemoryPlan plan() {
    add_models();
    add_generator();
    add_passes();
    return std::move(plan_);
  }

 private:
  bool trains() const {
    return std::ranges::any_of(options_.stages, [](const auto& s) { return s != to_string(Stage::kEval); });
  }
  bool generates() const { return options_.needs_prompts() || options_.has_stage(Stage::kEval); }

  // A model's numbers on one device.
  std::uint64_t share(std::int64_t count, std::uint64_t size, Sharding from) const {
    const std::uint64_t bytes = bytes_of(count, size);
    const auto devices = static_cast<std::uint64_t>(setting_.devices);
    return setting_.sharding < from ? bytes : (bytes + devices - 1) / devices;
  }
  std::uint64_t weights(std::int64_t count) const {
    return share(count, setting_.sizes.weight, Sharding::kWeights);
  }
  // A slice comes with the buffers that passes add to: of the largest layer, and of what is in none.
  std::uint64_t gradient(const ParameterCounts& model) const {
    const std::uint64_t held = share(model.trainable, setting_.sizes.gradient, Sharding::kGradients);
    if (setting_.sharding < Sharding::kGradients || setting_.devices == 1) return held;
    return held + bytes_of(model.largest_trainable_layer + model.trainable - model.trainable_in_layers,
                           setting_.sizes.gradient);
  }
  std::uint64_t optimizer(std::int64_t count) const {
    const MomentPlacement moments = options_.memory.moments();
    const bool on_device = setting_.sizes.weight < sizeof(float);
    if (!moments.on_host || !on_device) return share(count, setting_.sizes.optimizer, Sharding::kOptimizer);
    return share(count, setting_.sizes.optimizer - 2 * sizeof(float), Sharding::kOptimizer) +
           moments.device_bytes(share(count, 1, Sharding::kOptimizer));
  }

  // A frozen copy of what learns, or a teacher: on a GPU perhaps without layers that stay on the host.
  std::uint64_t frozen_weights(const ParameterCounts& model) const {
    const bool on_device = setting_.sizes.weight < sizeof(float);
    const std::int64_t in_use =
        static_cast<std::int64_t>(LayerStream::kPlaces) * model.largest_trainable_layer;
    if (!on_device || options_.memory.frozen_layers() == FrozenLayers::kOnDevice)
      return weights(model.trainable);
    return weights(model.trainable - model.trainable_in_layers + in_use);
  }

  void add(std::string name, const std::array<Need, kAllPhases.size()>& needs) {
    if (std::ranges::all_of(needs, [](const Need& need) { return need.wanted == 0; })) return;
    plan_.tenants.push_back({std::move(name), needs});
  }
  // Held from the first to the last moment.
  void add_fixed(std::string name, std::uint64_t bytes) {
    std::array<Need, kAllPhases.size()> needs;
    needs.fill({bytes, bytes});
    add(std::move(name), needs);
  }

  void add_models() {
    add_fixed("policy weights", weights(policy_.total));
    add_fixed("policy gradient", gradient(policy_));
    if (trains()) add_fixed("policy optimizer", optimizer(policy_.trainable));
    if (ppo_ && ppo::needs_critic(options_.ppo.algorithm)) {
      add_fixed("critic weights (own part)", weights(scalar_.trainable));
      add_fixed("critic gradient", gradient(scalar_));
      add_fixed("critic optimizer", optimizer(scalar_.trainable));
    }
    // Adapters are left out of the reference, which is then all shared.
    const bool copies = options_.model.trainable.mode != TrainableMode::kLora;
    const bool reference =
        (ppo_ && needs_ppo_reference(options_)) || (options_.has_stage(Stage::kOnlinePreference) &&
                                                    ppo::needs_reference(options_.online_preference.loss));
    if (reference && copies) add_fixed("reference (own part)", frozen_weights(policy_));
    if (options_.has_stage(Stage::kReward))
      add_fixed("reward model (own part, gradient)", weights(reward_.trainable) + gradient(reward_));
    if (ppo_ && setting_.teacher) {
      add_fixed("teacher weights", frozen_weights(count_parameters(*setting_.teacher, {})));
      add_fixed("teacher's pass", teacher_pass_bytes(*setting_.teacher, options_.rollout, options_.ppo,
                                                     setting_.longest_prompt));
    }
    if (ppo_ && options_.schedule.staleness() > 0)
      add_fixed("generator's copy of the weights", weights(policy_.trainable));
  }

  // A GPU runs the frozen layers again sooner than their results come back from the host.
  bool keeps_trunk() const {
    return ppo_ && policy_.first_trainable_layer > 0 && setting_.sizes.activation == sizeof(float);
  }
  // The generator keeps the states behind the frozen layers, block by block; see PpoModels.
  bool samples_trunk() const {
    return keeps_trunk() && options_.ppo.trunk_cache.resolve(setting_.machine_bytes) > 0 &&
           options_.ppo.reward_model_weight == 0 && !ppo::needs_critic(options_.ppo.algorithm) &&
           options_.rollout.weights == WeightFormat::kFp32;
  }

  void add_generator() {
    if (!generates()) return;
    if (options_.needs_prompts())
      add_fixed("generator's packed weights",
                RolloutWeights::bytes(options_.rollout.weights, setting_.model));
    add_fixed("generator's workspace",
              generator_workspace_bytes(setting_.model, options_.rollout, setting_.sizes.activation,
                                        setting_.longest_prompt));
    const BlockNeed blocks = block_need(options_.rollout, setting_.longest_prompt);
    const std::uint64_t block = block_bytes();
    Need need{bytes_of(blocks.minimum, block), bytes_of(blocks.wanted, block)};
    // Evaluation keeps its K and V unrounded; one block more, since both count whole ones.
    if (options_.has_stage(Stage::kEval) && options_.rollout.kv_dtype != KvFormat::kAuto)
      need.minimum = bytes_of(blocks.minimum + 1, block_bytes(KvFormat::kAuto));
    need.wanted = std::max(need.wanted, need.minimum);
    std::array<Need, kAllPhases.size()> needs;
    needs.fill(need);
    add(kKvCacheTenant, needs);
    if (keeps_trunk())
      add_fixed("frozen layers' results of a batch",
                trunk_result_bytes({setting_.model, options_.rollout, options_.ppo, options_.schedule,
                                    setting_.sizes.activation},
                                   setting_.longest_prompt, setting_.machine_bytes));
  }

  PassShape largest_pass() const {
    PassShape largest;
    const auto include = [&](Stage stage, std::int64_t tokens, std::int64_t sequences) {
      if (!options_.has_stage(stage)) return;
      const auto shape = shape_of(tokens, sequences);
      largest = {std::max(largest.rows, shape.rows), std::max(largest.blocks, shape.blocks),
                 std::max(largest.targets, shape.targets)};
    };
    if (ppo_) return largest_ppo_pass(options_.rollout, options_.ppo, setting_.longest_prompt);
    const auto& rejection = options_.rejection_sampling.sft;
    const auto& online = options_.online_preference;
    include(Stage::kPretrain, options_.pretrain.max_tokens_per_micro_batch,
            options_.pretrain.examples_per_step);
    include(Stage::kSft, options_.sft.max_tokens_per_micro_batch, options_.sft.examples_per_step);
    include(Stage::kReward, options_.reward.max_tokens_per_micro_batch, 2 * options_.reward.pairs_per_step);
    include(Stage::kPreference, options_.preference.max_tokens_per_micro_batch,
            2 * options_.preference.pairs_per_step);
    include(Stage::kRejectionSampling, rejection.max_tokens_per_micro_batch, rejection.examples_per_step);
    include(Stage::kOnlinePreference, online.max_tokens_per_micro_batch, 2 * online.prompts_per_step);
    return largest;
  }

  void add_passes() {
    if (!trains()) return;
    const PassShape shape = largest_pass();
    const auto bytes = [&](std::int64_t kept_layers) {
      const Recompute recompute = recompute_of(options_.memory.recompute);
      return BytesPredictor().predict(
          setting_.sizes.activation == sizeof(Bfloat16)
              ? SequencePass<Bfloat16>::activation_bytes(setting_.model, shape, kept_layers, recompute)
              : SequencePass<float>::activation_bytes(setting_.model, shape, kept_layers, recompute));
    };
    const std::uint64_t score = bytes(0),
                        train = bytes(setting_.model.num_layers - policy_.first_trainable_layer);
    // Between two passes the buffers may go.
    const Need between{0, train};
    add(kActivationsTenant, {between, Need{score, train}, Need{train, train}, between});
  }

  const RunOptions& options_;
  const PlanSetting& setting_;
  ParameterCounts policy_, scalar_, reward_;
  bool ppo_;
  MemoryPlan plan_;
};

std::uint64_t sum(const MemoryPlan& plan, Phase phase, std::uint64_t Need::*amount) {
  return std::accumulate(
      plan.tenants.begin(), plan.tenants.end(), std::uint64_t{0},
      [&](std::uint64_t total, const PlannedTenant& tenant) { return total + tenant.need(phase).*amount; });
}

Phase phase_with_most(const MemoryPlan& plan, std::uint64_t Need::*amount) {
  return *std::ranges::max_element(kAllPhases, {}, [&](Phase phase) { return sum(plan, phase, amount); });
}

}  // namespace

const char* to_string(Phase phase) {
  switch (phase) {
    case Phase::kGenerate:
      return "generate";
    case Phase::kScore:
      return "score";
    case Phase::kTrain:
      return "train";
    case Phase::kOptimize:
      return "optimize";
  }
  return "unknown";
}

std::uint64_t PlannedTenant::peak_bytes() const {
  return std::ranges::max_element(needs, {}, &Need::wanted)->wanted;
}

std::uint64_t MemoryPlan::minimum_bytes() const {
  std::uint64_t bytes = sum(*this, phase_with_most(*this, &Need::minimum), &Need::minimum);
  for (const MemoryPlan& other : other_stages) bytes = std::max(bytes, other.minimum_bytes());
  return bytes;
}

std::uint64_t MemoryPlan::wanted_bytes() const {
  std::uint64_t bytes = sum(*this, phase_with_most(*this, &Need::wanted), &Need::wanted);
  for (const MemoryPlan& other : other_stages) bytes = std::max(bytes, other.wanted_bytes());
  return bytes;
}

std::vector<std::uint64_t> MemoryPlan::held(Phase phase, std::uint64_t budget_bytes) const {
  const std::uint64_t minimum = sum(*this, phase, &Need::minimum);
  std::uint64_t left = budget_bytes > minimum ? budget_bytes - minimum : 0;
  std::vector<std::uint64_t> held;
  for (const PlannedTenant& tenant : tenants) {
    const std::uint64_t more = std::min(left, tenant.need(phase).reclaimable());
    held.push_back(tenant.need(phase).minimum + more);
    left -= more;
  }
  return held;
}

std::string MemoryPlan::list_of_needs() const {
  const Phase phase = phase_with_most(*this, &Need::minimum);
  for (const MemoryPlan& other : other_stages)
    if (other.minimum_bytes() > sum(*this, phase, &Need::minimum))
      return "\n  (in a stage before ppo)" + other.list_of_needs();
  std::string list;
  for (const PlannedTenant& tenant : tenants) {
    const Need& need = tenant.need(phase);
    if (need.minimum == 0) continue;
    list += concat("\n  ", memory_text(need.minimum), "  ", tenant.name);
    if (need.reclaimable() > 0) list += concat(" (wants ", memory_text(need.wanted), ")");
  }
  return list;
}

Recompute recompute_of(RecomputeChoice choice) {
  return choice == RecomputeChoice::kLayers ? Recompute::kLayers : Recompute::kNone;
}

RunOptions with_recompute_chosen(RunOptions options, const PlanSetting& setting, std::uint64_t budget_bytes) {
  if (options.memory.recompute != RecomputeChoice::kAuto) return options;
  options.memory.recompute = RecomputeChoice::kNone;
  if (!plan_memory(options, setting).fits(budget_bytes)) options.memory.recompute = RecomputeChoice::kLayers;
  return options;
}

MemoryPlan plan_memory(const RunOptions& options, const PlanSetting& setting) {
  RLHF_CHECK(setting.devices >= 1 && setting.longest_prompt >= 1, "memory plan: ", setting.devices,
             " devices and a longest prompt of ", setting.longest_prompt, " tokens, expected at least 1");
  MemoryPlan plan = Planner(options, setting).plan();
  if (!options.has_stage(Stage::kPpo) || options.stages.size() == 1) return plan;
  RunOptions others = options;
  std::erase(others.stages, to_string(Stage::kPpo));
  plan.other_stages.push_back(Planner(others, setting).plan());
  return plan;
}

std::uint64_t generator_workspace_bytes(const ModelConfig& model, const RolloutOptions& rollout,
                                        std::uint64_t number_bytes, std::int64_t longest_prompt) {
  const std::int64_t D = model.hidden_size, F = model.intermediate_size, M = model.gated_mlp ? 2 * F : F;
  const bool on_device = number_bytes < sizeof(float);
  const std::int64_t rows = step_tokens(rollout.max_tokens_per_step, on_device),
                     sampled = std::min(rows, rollout.max_sequences);
  const std::int64_t per_row =
      (model.post_norms ? 3 : 2) * D + 2 * model.query_width() + 2 * model.kv_width() + M + F;
  const std::int64_t drawn = on_device ? padded_decode_rows(std::min(sampled, kDeviceLogitsRows))
                                       : std::min(sampled, kHostLogitsRows);
  const std::int64_t rope =
      model.learned_positions ? 0 : std::max<std::int64_t>(256, 2 * rollout.max_new_tokens);
  const std::uint64_t quantised = rollout.weights == WeightFormat::kInt8
                                      ? QuantisedRows::bytes(rows, RolloutWeights::most_inputs(model))
                                      : 0;
  const std::uint64_t bytes = bytes_of(rows * per_row + sampled * D, number_bytes) +
                              bytes_of(drawn * model.vocab_size + rope * model.head_dim, sizeof(float)) +
                              quantised;
  if (!on_device) return bytes;
  // Parts of attention, for rows that are in no tile (a sequence has fewer than a tile's least), and of
  // logits; what comes back of a draw.
  const std::int64_t alone =
      kernels::takes_tiles(model.head_dim) ? std::min(rows, kernels::kMinTileRows * sampled) : rows;
  const std::int64_t longest = longest_prompt + rollout.max_new_tokens, keys = padded_decode_keys(longest);
  const std::uint64_t edits =
      has_penalties(rollout.sampling) ? step_edits_bytes(drawn, std::min(longest, model.vocab_size)) : 0;
  return bytes + edits +
         bytes_of(kernels::attention_workspace(alone, model.num_heads, model.head_dim, keys, 0),
                  sizeof(float)) +
         bytes_of(kernels::logits_workspace(drawn, model.vocab_size), sizeof(double)) +
         bytes_of(drawn, kDrawResultBytes);
}

std::uint64_t teacher_pass_bytes(const ModelConfig& teacher, const RolloutOptions& rollout,
                                 const PpoStageOptions& options, std::int64_t longest_prompt) {
  const PassShape shape = largest_ppo_pass(rollout, options, longest_prompt);
  return BytesPredictor().predict(SequencePass<float>::activation_bytes(teacher, shape, 0));
}

std::optional<ModelConfig> teacher_config(const RunOptions& options) {
  if (options.distillation.teacher.empty()) return {};
  return load_model_config(options.distillation.teacher);
}

std::uint64_t trunk_result_bytes(const TrunkResults& results, std::int64_t longest_prompt,
                                 std::uint64_t machine_bytes) {
  const ppo::PpoOptions& algorithm = results.options.algorithm;
  const auto samples = static_cast<std::int64_t>(algorithm.prompts_per_step * algorithm.samples_per_prompt);
  const std::uint64_t batch =
      bytes_of(samples * (longest_prompt + results.rollout.max_new_tokens) * results.model.hidden_size,
               results.number_bytes);
  const auto num_batches = static_cast<std::uint64_t>(1 + results.schedule.staleness());
  return num_batches * std::min(results.options.trunk_cache.resolve(machine_bytes), batch);
}

std::int64_t blocks_under(const RunOptions& options, const PlanSetting& setting, std::uint64_t budget_bytes) {
  Planner planner(options, setting);
  const std::uint64_t block = planner.block_bytes();
  const MemoryPlan plan = planner.plan();
  const auto held = plan.held(Phase::kGenerate, budget_bytes);
  for (std::size_t i = 0; i < held.size(); ++i)
    if (plan.tenants[i].name == kKvCacheTenant) return static_cast<std::int64_t>(held[i] / block);
  return 0;
}

bool needs_ppo_reference(const RunOptions& options) {
  return ppo::needs_reference(options.ppo.algorithm) || options.has_stage(Stage::kEval);
}

std::string memory_text(std::uint64_t bytes) {
  constexpr double kMiB = 1 << 20, kGiB = 1 << 30;
  const auto amount = static_cast<double>(bytes);
  char text[32];
  if (amount < 10 * kMiB)
    std::snprintf(text, sizeof text, "%.0f KiB", amount / 1024);
  else if (amount < 10 * kGiB)
    std::snprintf(text, sizeof text, "%.0f MiB", amount / kMiB);
  else
    std::snprintf(text, sizeof text, "%.1f GiB", amount / kGiB);
  return text;
}

}  // namespace rlhf

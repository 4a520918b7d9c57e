#include "rlhf/train/plan_advice.h"

#include <algorithm>
#include <functional>

#include "rlhf/core/error.h"

namespace rlhf {
namespace {

constexpr std::int64_t kMostTokens = 100'000'000;  // bound of ppo.max_tokens_per_micro_batch
constexpr std::int64_t kMostSequences = 4096;      // bound of rollout.max_sequences
constexpr std::int64_t kMostDevices = 4096;

// A run as it would be after some changes.
struct Variant {
  RunOptions options;
  PlanSetting setting;
  std::vector<std::pair<std::string, std::string>> changes;
};

// The largest value in [low, high] that passes, when smaller ones pass more easily.
std::optional<std::int64_t> largest(std::int64_t low, std::int64_t high,
                                    const std::function<bool(std::int64_t)>& passes) {
  if (low > high || !passes(low)) return {};
  while (low < high) {
    const std::int64_t middle = low + (high - low + 1) / 2;
    if (passes(middle))
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

struct TokenKey {
  const char* key;
  Stage stage;
  std::int64_t* tokens;
};

// The micro-batch keys of the run's stages.
std::vector<TokenKey> token_keys(RunOptions& options) {
  std::vector<TokenKey> keys = {
      {"ppo.max_tokens_per_micro_batch", Stage::kPpo, &options.ppo.max_tokens_per_micro_batch},
      {"pretrain.max_tokens_per_micro_batch", Stage::kPretrain, &options.pretrain.max_tokens_per_micro_batch},
      {"sft.max_tokens_per_micro_batch", Stage::kSft, &options.sft.max_tokens_per_micro_batch},
      {"reward.max_tokens_per_micro_batch", Stage::kReward, &options.reward.max_tokens_per_micro_batch},
      {"preference.max_tokens_per_micro_batch", Stage::kPreference,
       &options.preference.max_tokens_per_micro_batch},
      {"rejection_sampling.sft.max_tokens_per_micro_batch", Stage::kRejectionSampling,
       &options.rejection_sampling.sft.max_tokens_per_micro_batch},
      {"online_preference.max_tokens_per_micro_batch", Stage::kOnlinePreference,
       &options.online_preference.max_tokens_per_micro_batch}};
  std::erase_if(keys, [&](const TokenKey& key) { return !options.has_stage(key.stage); });
  return keys;
}

// In a run file as far as runs do it.
std::pair<std::string, std::string> sharding_change(Sharding sharding) {
  if (sharding == Sharding::kOptimizer) return {"distributed.sharding", "zero1"};
  if (sharding == Sharding::kGradients) return {"distributed.sharding", "zero2"};
  return {"--shard", to_string(sharding)};
}

// No stage has larger micro-batches than this.
void cap_tokens(Variant& variant, std::int64_t tokens) {
  for (const TokenKey& key : token_keys(variant.options)) {
    if (*key.tokens <= tokens) continue;
    *key.tokens = tokens;
    variant.changes.emplace_back(key.key, std::to_string(tokens));
  }
}

class Adviser {
 public:
  Adviser(const RunOptions& options, const PlanSetting& setting, std::uint64_t budget_bytes)
      : start_{options, setting, {}}, budget_(budget_bytes) {}

  std::vector<Advice> advise() {
    try_with_smaller_passes(start_);
    Variant no_trunk = start_;
    no_trunk.options.ppo.trunk_cache = {};
    no_trunk.changes.emplace_back("ppo.trunk_cache", "0");
    if (minimum_bytes(no_trunk) < minimum_bytes(start_)) try_with_smaller_passes(no_trunk);
    try_recompute();
    try_offload();
    try_fp8();
    if (start_.setting.devices > 1) try_sharding(start_);
    if (start_.options.schedule.staleness() > 0) try_on_policy(start_);
    for (const auto& way : {&Adviser::try_fewer_layers, &Adviser::try_adapters}) {
      const std::size_t before = advice_.size();
      (this->*way)(start_);
      if (advice_.size() == before && can_shard()) (this->*way)(all_sharded());
    }
    if (advice_.empty()) try_more_devices();
    return std::move(advice_);
  }

 private:
  std::uint64_t minimum_bytes(const Variant& variant) const {
    return plan_memory(with_recompute_chosen(variant.options, variant.setting, budget_), variant.setting)
        .minimum_bytes();
  }
  bool fits(const Variant& variant) const { return minimum_bytes(variant) <= budget_; }

  void accept(const Variant& variant) { advice_.push_back({variant.changes, minimum_bytes(variant)}); }

  bool can_shard() const {
    return start_.setting.devices > 1 && start_.setting.sharding < Sharding::kWeights;
  }
  Variant all_sharded() const {
    Variant variant = start_;
    variant.setting.sharding = Sharding::kWeights;
    variant.changes.push_back(sharding_change(Sharding::kWeights));
    return variant;
  }

  // As it is, or else with the largest micro-batches that fit.
  bool try_with_smaller_passes(const Variant& variant) {
    if (fits(variant)) {
      if (!variant.changes.empty()) accept(variant);
      return true;
    }
    RunOptions options = variant.options;
    std::int64_t most = 0;
    for (const TokenKey& key : token_keys(options)) most = std::max(most, *key.tokens);
    const auto capped = [&](std::int64_t tokens) {
      Variant smaller = variant;
      cap_tokens(smaller, tokens);
      return smaller;
    };
    const auto tokens = largest(2, most, [&](std::int64_t t) { return fits(capped(t)); });
    if (tokens) accept(capped(*tokens));
    return tokens.has_value();
  }

  // Where it was excluded; `auto` has it in every variant that needs it.
  void try_recompute() {
    Variant again = start_;
    again.options.memory.recompute = RecomputeChoice::kLayers;
    again.changes.emplace_back("memory.recompute", "layers");
    if (minimum_bytes(again) < minimum_bytes(start_)) try_with_smaller_passes(again);
  }

  // The least that helps, since what is left on the host has to come for every use.
  void try_offload() {
    for (const auto& [offload, name] :
         {std::pair{Offload::kOptimizer, "optimizer"}, std::pair{Offload::kAll, "all"}}) {
      Variant offloaded = start_;
      offloaded.options.memory.offload = offload;
      offloaded.changes.emplace_back("memory.offload", name);
      if (minimum_bytes(offloaded) < minimum_bytes(start_) && try_with_smaller_passes(offloaded)) return;
    }
  }

  // K and V take half on a GPU; nothing else changes, so it helps where they are the most.
  void try_fp8() {
    if (start_.setting.sizes.kv != sizeof(Bfloat16)) return;
    Variant rounded = start_;
    rounded.options.rollout.kv_dtype = KvFormat::kFp8;
    rounded.changes.emplace_back("rollout.kv_dtype", to_string(KvFormat::kFp8));
    if (minimum_bytes(rounded) < minimum_bytes(start_)) try_with_smaller_passes(rounded);
  }

  void try_sharding(Variant variant) {
    // The least that helps: what is divided has to be exchanged.
    while (variant.setting.sharding < Sharding::kWeights) {
      variant.setting.sharding = static_cast<Sharding>(static_cast<int>(variant.setting.sharding) + 1);
      variant.changes = {sharding_change(variant.setting.sharding)};
      if (try_with_smaller_passes(variant)) return;
    }
  }

  void try_on_policy(Variant variant) {
    variant.options.schedule = {ScheduleMode::kStreamed, {}};
    variant.changes.emplace_back("schedule.mode", "streamed");
    try_with_smaller_passes(variant);
  }

  void try_fewer_layers(const Variant& variant) {
    const TrainableOptions& now = variant.options.model.trainable;
    if (now.mode != TrainableMode::kAll && now.mode != TrainableMode::kLastLayers) return;
    const auto trained = [&](std::int64_t layers) {
      Variant fewer = variant;
      fewer.options.model.trainable.mode = TrainableMode::kLastLayers;
      fewer.options.model.trainable.last_layers = layers;
      if (now.mode == TrainableMode::kAll) fewer.changes.emplace_back("model.trainable", "last_layers");
      fewer.changes.emplace_back("model.last_layers", std::to_string(layers));
      return fewer;
    };
    const std::int64_t most =
        now.mode == TrainableMode::kAll ? variant.setting.model.num_layers : now.last_layers;
    const auto layers = largest(1, most - 1, [&](std::int64_t n) { return fits(trained(n)); });
    if (layers)
      accept(trained(*layers));
    else
      try_with_smaller_passes(trained(1));
  }

  void try_adapters(const Variant& start) {
    Variant variant = start;
    if (variant.options.model.trainable.mode == TrainableMode::kLora) return;
    variant.options.model.trainable.mode = TrainableMode::kLora;
    variant.changes.emplace_back("model.trainable", "lora");
    try {
      try_with_smaller_passes(variant);
    } catch (const InvalidArgument&) {
      // The model has none of the default targets: no such advice.
    }
  }

  // More devices only help where something is divided.
  void try_more_devices() {
    const Variant variant = start_.setting.sharding < Sharding::kWeights ? all_sharded() : start_;
    for (std::int64_t devices = 2 * variant.setting.devices; devices <= kMostDevices; devices *= 2) {
      Variant more = variant;
      more.setting.devices = devices;
      more.changes.insert(more.changes.begin(), {"--devices", std::to_string(devices)});
      if (try_with_smaller_passes(more)) return;
    }
  }

  Variant start_;
  std::uint64_t budget_;
  std::vector<Advice> advice_;
};

// As a memory size of a run file, not below the bytes.
std::string rounded_up(std::uint64_t bytes) {
  return concat((bytes + 1023) >> 10, "KiB");
}

std::uint64_t tenant_bytes(const MemoryPlan& plan, const char* name) {
  for (const PlannedTenant& tenant : plan.tenants)
    if (tenant.name == name) return tenant.peak_bytes();
  return 0;
}

}  // namespace

std::vector<Advice> advise(const RunOptions& options, const PlanSetting& setting,
                           std::uint64_t budget_bytes) {
  return Adviser(options, setting, budget_bytes).advise();
}

std::string to_string(const Advice& advice) {
  std::string text;
  for (const auto& [key, value] : advice.changes) {
    if (!text.empty()) text += ", ";
    text += key.starts_with("--") ? concat(key, " ", value) : concat(key, ": ", value);
  }
  return text;
}

BatchLimits batch_limits(const RunOptions& options, const PlanSetting& setting, std::uint64_t budget_bytes) {
  const auto with_tokens = [&](std::int64_t tokens) {
    RunOptions changed = options;
    changed.ppo.max_tokens_per_micro_batch = tokens;
    return plan_memory(changed, setting);
  };
  const auto with_sequences = [&](std::int64_t sequences) {
    RunOptions changed = options;
    changed.rollout.max_sequences = sequences;
    return plan_memory(changed, setting);
  };
  BatchLimits limits;
  limits.micro_batch_tokens =
      largest(2, kMostTokens, [&](std::int64_t t) { return with_tokens(t).fits(budget_bytes); });
  // While they are decoded, the passes' buffers may be gone.
  limits.max_sequences = largest(1, kMostSequences, [&](std::int64_t n) {
                           const MemoryPlan plan = with_sequences(n);
                           if (!plan.fits(budget_bytes)) return false;
                           const auto held = plan.held(Phase::kGenerate, budget_bytes);
                           for (std::size_t i = 0; i < held.size(); ++i)
                             if (plan.tenants[i].name == kKvCacheTenant &&
                                 held[i] < plan.tenants[i].need(Phase::kGenerate).wanted)
                               return false;
                           return true;
                         }).value_or(0);
  constexpr std::int64_t kMany = 1 << 20;  // beyond what any stage's own setting hides
  limits.token_bytes = (tenant_bytes(with_tokens(2 * kMany), kActivationsTenant) -
                        tenant_bytes(with_tokens(kMany), kActivationsTenant)) /
                       kMany;
  limits.sequence_bytes =
      tenant_bytes(with_sequences(2), kKvCacheTenant) - tenant_bytes(with_sequences(1), kKvCacheTenant);
  return limits;
}

void require_fit(const RunOptions& options, const PlanSetting& setting, std::uint64_t budget_bytes,
                 const std::string& key) {
  const MemoryPlan plan = plan_memory(with_recompute_chosen(options, setting, budget_bytes), setting);
  if (plan.fits(budget_bytes)) return;
  std::string advice;
  for (const Advice& way : advise(options, setting, budget_bytes)) advice += "\n  " + to_string(way);
  fail<MemoryError>(key, " is ", memory_text(budget_bytes), " but the run needs at least ",
                    memory_text(plan.minimum_bytes()), ":", plan.list_of_needs(),
                    "\nwhat would make it fit:\n  ", key, ": ", rounded_up(plan.minimum_bytes()), advice);
}

}  // namespace rlhf

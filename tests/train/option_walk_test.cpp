// Every key of ppo.algorithm must do something: a tiny run is made with each of its values, and what was
// sampled and what was learned must differ. An option that the trainer reads and forgets is found here.
#include <cmath>
#include <map>
#include <set>

#include "rlhf/config/description.h"
#include "rlhf/train/build_environment.h"
#include "rlhf/train/build_task.h"
#include "rlhf/train/ppo_trainer.h"
#include "tests/catch.h"
#include "tests/train/gradient_check.h"
#include "tests/train/tiny_run.h"

namespace rlhf {
namespace {

using Overrides = std::vector<std::string>;

/// A key, the setting in which it matters, and the values to tell apart.
struct Walk {
  Overrides setting;
  std::vector<std::string> values;               ///< empty: all choices of the key
  std::map<std::string, Overrides> value_needs;  ///< what one value needs besides
};

class RecordKeeper : public RunObserver {
 public:
  void record(const std::string&, std::int64_t, const Hashes& hashes) override {
    for (const auto& [name, hash] : hashes) records += name + "=" + hash + " ";
  }
  bool wants_records() const override { return true; }
  std::string records;
};

const Overrides kCommon = {"stages=[ppo]",
                           "rewards=[{type: length, min_tokens: 2, max_tokens: 4, slope_tokens: 3}, {type: "
                           "regex, pattern: '[a-m]', weight: 2}]",
                           "ppo.iterations=3", "ppo.reward_model_weight=0", "ppo.critic_init=policy",
                           "ppo.old_log_probs=recompute", "ppo.algorithm.samples_per_prompt=4",
                           "ppo.algorithm.kl.controller.kind=fixed",
                           "ppo.algorithm.optimizer.learning_rate=0.02",
                           // Else Adam's steps would not depend on the scale of the gradient.
                           "ppo.algorithm.optimizer.epsilon=0.1", "ppo.algorithm.optimizer.max_grad_norm=0"};

Overrides operator+(Overrides left, const Overrides& right) {
  left.insert(left.end(), right.begin(), right.end());
  return left;
}

Overrides algorithm(const Overrides& keys) {
  Overrides full;
  for (const std::string& key : keys) full.push_back("ppo.algorithm." + key);
  return full;
}

// Group advantages without critic or KL.
const Overrides kGroup =
    algorithm({"critic_update=none", "value_positions=tokens", "kl.placement=none", "advantage.form=sequence",
               "advantage.whitening=none", "advantage.group.baseline=mean", "advantage.group.scale=group"});
const Overrides kReinforce =
    kGroup +
    algorithm({"advantage.form=reward_to_go", "advantage.group.baseline=none", "advantage.group.scale=none"});
const Overrides kSeparate =
    algorithm({"critic_update=separate", "critic_optimizer.epsilon=0.1", "critic_optimizer.max_grad_norm=0"});

Overrides corrected(const Overrides& keys) {
  return kGroup + algorithm({"correction.level=token", "correction.mode=clip"}) + algorithm(keys);
}

Overrides objective(const std::string& name, const Overrides& keys = {}) {
  return kGroup + algorithm({"policy.objective=" + name}) + algorithm(keys);
}

void add_optimizer(std::map<std::string, Walk>& walks, const std::string& prefix, const Overrides& setting) {
  const auto add = [&](const std::string& key, const Overrides& keys, std::vector<std::string> values) {
    Overrides full = setting;
    for (const std::string& k : keys) full.push_back("ppo.algorithm." + prefix + k);
    walks[prefix + key] = {full, std::move(values), {}};
  };
  add("learning_rate", {}, {"0.02", "0.01"});
  add("beta1", {}, {"0.9", "0.5"});
  add("beta2", {}, {"0.999", "0.5"});
  add("epsilon", {}, {"0.1", "0.2"});
  add("weight_decay", {}, {"0", "0.5"});
  add("max_grad_norm", {}, {"0", "0.001"});
  add("schedule.shape", {"schedule.power=2", "schedule.decay_steps=2"}, {});
  add("schedule.warmup_steps", {}, {"0", "2"});
  add("schedule.warmup_ratio", {}, {"0", "0.7"});
  add("schedule.start_ratio", {"schedule.warmup_steps=2"}, {"0", "0.5"});
  add("schedule.min_ratio", {"schedule.shape=cosine"}, {"0", "0.5"});
  add("schedule.cycles", {"schedule.shape=cosine"}, {"0.5", "2"});
  add("schedule.power", {"schedule.shape=polynomial"}, {"1", "2"});
  add("schedule.decay_steps", {"schedule.shape=warmup_stable_decay"}, {"1", "2"});
  add("schedule.stable_ratio", {"schedule.shape=warmup_stable_decay"}, {"0.3", "0.9"});
}

void add_aggregation(std::map<std::string, Walk>& walks, const std::string& prefix,
                     const Overrides& setting) {
  // Responses that train nothing tell "all responses" from "responses with tokens".
  walks[prefix + "mode"] = {setting + algorithm({"reward.mask_truncated=true"}), {}, {}};
  walks[prefix + "scale"] = {setting + algorithm({prefix + "mode=constant"}), {"0", "5"}, {}};
  walks[prefix + "length_epsilon"] = {
      setting + algorithm({prefix + "mode=sequence_mean_token_mean"}), {"0", "2"}, {}};
}

void add_batch(std::map<std::string, Walk>& w) {
  w["prompts_per_step"] = {kGroup, {"3", "2"}, {}};
  w["samples_per_prompt"] = {kGroup, {"4", "3"}, {}};
  w["epochs"] = {kGroup, {"1", "2"}, {}};
  w["mini_batches"] = {kGroup, {"1", "2"}, {}};
  const Overrides ties =
      kGroup + Overrides{"rewards=[{type: regex, pattern: '[a-m]'}]"} + algorithm({"samples_per_prompt=2"});
  w["dynamic_sampling.enabled"] = {ties, {"false", "true"}, {}};
  w["dynamic_sampling.max_rounds"] = {ties + algorithm({"dynamic_sampling.enabled=true"}), {"1", "10"}, {}};
}

void add_reward(std::map<std::string, Walk>& w) {
  w["reward.normalization"] = {{}, {}, {}};
  w["reward.score.clip_min"] = {kGroup, {"null", "-0.1"}, {}};
  w["reward.score.clip_max"] = {kGroup, {"null", "0.5"}, {}};
  w["reward.score.missing_eos_penalty"] = {kGroup, {"null", "1"}, {}};
  w["reward.clip_stage"] = {kGroup + algorithm({"reward.score.clip_max=0.5"}), {}, {}};
  w["reward.placement"] = {{}, {}, {}};
  w["reward.whiten"] = {{}, {"false", "true"}, {}};
  w["reward.mask_truncated"] = {kGroup, {"false", "true"}, {}};
  const Overrides overlong = kGroup + algorithm({"reward.length.overlong_buffer=2"});
  w["reward.length.max_response_tokens"] = {overlong, {"0", "5"}, {}};
  w["reward.length.overlong_buffer"] = {kGroup, {"0", "3"}, {}};
  w["reward.length.overlong_factor"] = {overlong, {"1", "2"}, {}};
  w["reward.length.overlong_capped"] = {
      overlong + algorithm({"reward.length.max_response_tokens=5"}), {"true", "false"}, {}};
  w["reward.length.truncated_score"] = {kGroup, {"null", "0.5"}, {}};
  w["kl.placement"] = {{}, {}, {}};
  w["kl.coefficient"] = {{}, {"0.1", "0.5"}, {}};
  w["kl.estimator.estimator"] = {{}, {}, {}};
  w["kl.estimator.clamp"] = {{}, {"0", "0.001"}, {}};
  const Overrides adaptive = algorithm({"kl.controller.kind=adaptive"});
  w["kl.controller.kind"] = {algorithm({"kl.controller.horizon=20"}), {}, {}};
  w["kl.controller.target"] = {adaptive + algorithm({"kl.controller.horizon=20"}), {"6", "0.0001"}, {}};
  w["kl.controller.horizon"] = {adaptive, {"20", "40"}, {}};
}

void add_advantage(std::map<std::string, Walk>& w) {
  const Overrides critic = algorithm({"critic_update=joint"});
  w["advantage.form"] = {kGroup + algorithm({"advantage.group.baseline=none", "advantage.group.scale=none",
                                             "kl.placement=token"}),
                         {},
                         {{"gae", critic}}};
  w["advantage.gae.gamma"] = {{}, {"1", "0.5"}, {}};
  w["advantage.gae.lambda"] = {{}, {"0.95", "0.5"}, {}};
  w["advantage.gae.mask"] = {{}, {}, {}};
  w["advantage.gae.length_adaptive_alpha"] = {{}, {"0", "0.5"}, {}};
  w["advantage.gae.bootstrap_truncated"] = {{}, {"false", "true"}, {}};
  w["advantage.greedy_baseline"] = {kReinforce, {"false", "true"}, {}};
  w["advantage.whitening"] = {{}, {}, {}};
  w["advantage.group.baseline"] = {kGroup + algorithm({"advantage.group.scale=none"}), {}, {}};
  w["advantage.group.scale"] = {kGroup + Overrides{"rewards=[{type: regex, pattern: '[a-m]'}]"}, {}, {}};
  w["advantage.group.epsilon"] = {kGroup, {"1e-6", "0.5"}, {}};
  w["advantage.group.singletons"] = {
      kGroup + algorithm({"samples_per_prompt=1", "advantage.group.baseline=none"}), {}, {}};
  w["advantage.group.precision"] = {kGroup, {}, {}};
}

void add_correction(std::map<std::string, Walk>& w) {
  w["correction.level"] = {corrected({"correction.lower=0.7"}), {}, {}};
  w["correction.mode"] = {corrected({"correction.lower=0.7", "correction.upper=1.2"}), {}, {}};
  w["correction.gate"] = {corrected({}), {}, {}};
  w["correction.lower"] = {corrected({}), {"0", "0.9"}, {}};
  w["correction.upper"] = {corrected({}), {"2", "0.9"}, {}};
  w["correction.batch_normalize"] = {corrected({}), {"false", "true"}, {}};
  w["correction.log_ratio_bound"] = {corrected({}), {"20", "0.1"}, {}};
  const auto threshold = [](const char* bound) {
    return algorithm({std::string("correction.rejection_threshold=\"") + bound + "\""});
  };
  w["correction.rejection"] = {kGroup,
                               {"", "token_k2", "seq_mean_k3"},
                               {{"token_k2", threshold("1")}, {"seq_mean_k3", threshold("1")}}};
  w["correction.rejection_threshold"] = {
      kGroup + algorithm({"correction.rejection=token_k2"}), {"\"1\"", "\"100\""}, {}};
  w["correction.bypass"] = {kGroup, {"false", "true"}, {}};
}

void add_policy(std::map<std::string, Walk>& w) {
  const Overrides drifts = kGroup + algorithm({"epochs=3"});
  w["policy.objective"] = {
      drifts + algorithm({"policy.clip_low=0.01", "policy.clip_high=0.01", "policy.covariance.fraction=0.3",
                          "policy.covariance.low=-10", "policy.covariance.high=10"}),
      {},
      {}};
  w["policy.ratio_level"] = {algorithm({"epochs=3"}), {}, {}};  // advantages that differ within a response
  w["policy.clip_low"] = {drifts, {"0.2", "0.01"}, {}};
  w["policy.clip_high"] = {drifts, {"0.2", "0.01"}, {}};
  w["policy.dual_clip"] = {drifts, {"0", "1.01"}, {}};
  w["policy.ratio_cap"] = {drifts, {"0", "1.01"}, {}};
  w["policy.log_ratio_min"] = {drifts, {"null", "-0.01"}, {}};
  w["policy.log_ratio_max"] = {drifts, {"null", "0.01"}, {}};
  w["policy.sapo_tau_positive"] = {objective("sapo", {"epochs=3"}), {"1", "2"}, {}};
  w["policy.sapo_tau_negative"] = {objective("sapo", {"epochs=3"}), {"1.05", "2"}, {}};
  w["policy.dro_beta"] = {objective("dro", {"epochs=3"}), {"0.1", "1"}, {}};
  const Overrides band = {"policy.covariance.low=-10", "policy.covariance.high=10", "epochs=3",
                          "policy.covariance.fraction=0.2"};
  w["policy.covariance.fraction"] = {objective("clip_cov", band), {"0.1", "0.5"}, {}};
  w["policy.covariance.low"] = {objective("clip_cov", band), {"-10", "0"}, {}};
  w["policy.covariance.high"] = {objective("clip_cov", band), {"10", "0"}, {}};
  w["policy.covariance.kl_coefficient"] = {objective("kl_cov", band), {"1", "2"}, {}};
  for (const char* key : {"k_positive", "lambda_positive", "k_negative", "lambda_negative"})
    w[std::string("policy.vespo.") + key] = {objective("vespo", {"epochs=3"}), {"1", "2"}, {}};
  const Overrides kl = kGroup + algorithm({"policy.kl.coefficient=0.5", "epochs=2"});
  w["policy.kl.coefficient"] = {kGroup, {"0", "0.5"}, {}};
  w["policy.kl.estimator.estimator"] = {kl, {}, {}};
  w["policy.kl.estimator.gradient"] = {kl + algorithm({"policy.kl.estimator.estimator=k3"}), {}, {}};
  w["policy.kl.estimator.clamp"] = {kl, {"0", "0.001"}, {}};
  w["policy.kl.ratio_weighted"] = {kl, {"false", "true"}, {}};
  w["policy.entropy_coefficient"] = {kGroup, {"0", "0.5"}, {}};
  w["policy.entropy_aggregation"] = {
      kGroup + algorithm({"policy.entropy_coefficient=0.5", "policy.aggregation.mode=token_sum"}), {}, {}};
  w["policy.top_entropy_quantile"] = {kGroup, {"1", "0.3"}, {}};
  // In the only step of a batch the trainer has not moved: what is off policy is the sampler alone.
  w["policy.off_policy_threshold"] = {
      kGroup + algorithm({"epochs=1", "mini_batches=1"}), {"null", "0.01"}, {}};
}

void add_value(std::map<std::string, Walk>& w) {
  w["value.error"] = {algorithm({"value.huber_delta=0.1"}), {}, {}};
  w["value.huber_delta"] = {algorithm({"value.error=huber"}), {"0.1", "0.2"}, {}};
  w["value.clip_range"] = {{}, {"0", "0.01"}, {}};
  w["value.coefficient"] = {{}, {"0.1", "1"}, {}};
  const Overrides teacher = {"distillation.teacher=in this test"};
  w["distillation.coefficient"] = {kGroup, {"0", "1"}, {{"1", teacher}}};
  w["distillation.estimate"] = {kGroup + teacher + algorithm({"distillation.coefficient=1"}), {}, {}};
  w["value_positions"] = {{}, {}, {}};
  w["critic_update"] = {{}, {}, {{"none", algorithm({"advantage.form=reward_to_go"})}}};
}

std::map<std::string, Walk> all_walks() {
  std::map<std::string, Walk> walks;
  add_batch(walks);
  add_reward(walks);
  add_advantage(walks);
  add_correction(walks);
  add_policy(walks);
  add_value(walks);
  add_aggregation(walks, "policy.aggregation.", kGroup);
  add_aggregation(walks, "value.aggregation.", kSeparate);
  add_optimizer(walks, "optimizer.", kGroup);
  add_optimizer(walks, "critic_optimizer.", kSeparate);
  return walks;
}

/// Says "xy" behind the first "a" of a response.
class Interruption : public EnvironmentFactory {
 public:
  std::unique_ptr<Environment> begin(const EpisodeStart&) const override {
    class Once : public Environment {
      Observation observe(const AssistantTurn& turn) override {
        Observation observation;
        if (turn.number == 1) observation.text = "xy";
        return observation;
      }
    };
    return std::make_unique<Once>();
  }
  const std::vector<std::string>& turn_strings() const override { return strings_; }
  bool hears_stops() const override { return false; }
  bool answers_at_once() const override { return true; }

 private:
  std::vector<std::string> strings_ = {"a"};
};

/// What a tiny run samples and learns, as hashes. One interruption a response leaves a hole in its mask; a
/// logit bias that the trainer does not know makes responses end early and the sampler differ from the
/// trainer.
std::string records_of(const TinyData& data, const Overrides& overrides) {
  const RunOptions options = data.options("walk", overrides);
  LanguageModel policy = load_policy(options);
  TaskData task = build_task(options, policy);
  task.environments[""] = build_episodes({}, std::make_shared<Interruption>(), policy);
  ThreadPool pool(1);
  StageContext context{Compute<float>(pool, kernels::detect_cpu_isa())};
  RecordKeeper keeper;
  context.observer = &keeper;
  context.seed = options.run.seed;
  const Parameters<float> reference = policy.parameters().frozen_copy();
  const auto bias = [&](GenerationRequest& request, std::uint64_t) {
    request.constraint.logit_bias = {{policy.end_token(), 3.5F}, {'a', 3.5F}};
  };
  const PpoSetting setting{task, options.rollout, options.ppo, context, options.schedule, bias};
  const LanguageModel teacher = LanguageModel::create(tiny_model(), {}, 99);
  const bool distils = options.ppo.algorithm.distillation.coefficient > 0;
  PpoTrainer(policy, {&reference, nullptr, nullptr, distils ? &teacher.parameters() : nullptr}, setting)
      .run();
  return keeper.records;
}

std::vector<config::FieldInfo> algorithm_fields() {
  std::vector<config::FieldInfo> fields;
  for (config::FieldInfo& field : config::list_fields<ppo::PpoOptions>())
    if (!field.type.starts_with("group") && field.type != "list of groups")
      fields.push_back(std::move(field));
  return fields;
}

// The KL in the reward is a number: nothing is differentiated. Other values are refused.
const std::set<std::string> kRefused = {"kl.estimator.gradient"};

}  // namespace

TEST_CASE("every key and value of ppo.algorithm changes what a run samples or learns") {
  const TinyData data;
  const std::map<std::string, Walk> walks = all_walks();
  std::size_t runs = 0;
  for (const config::FieldInfo& field : algorithm_fields()) {
    if (kRefused.count(field.path)) continue;
    INFO("ppo.algorithm." << field.path);
    const auto walk = walks.find(field.path);
    REQUIRE(walk != walks.end());
    const auto& [setting, listed, needs] = walk->second;
    const std::vector<std::string>& values = listed.empty() ? field.choices : listed;
    REQUIRE(values.size() >= 2);
    std::map<std::string, std::string> seen;  // records -> value
    for (const std::string& value : values) {
      Overrides overrides = kCommon + setting;
      if (const auto more = needs.find(value); more != needs.end()) overrides = overrides + more->second;
      overrides.push_back("ppo.algorithm." + field.path + "=" + (value.empty() ? "\"\"" : value));
      std::string records;
      INFO("value " << value);
      CHECK_NOTHROW(records = records_of(data, overrides));
      ++runs;
      const auto [other, is_new] = seen.emplace(records, value);
      INFO("the run is the same as with " << other->second);
      CHECK(is_new);
    }
  }
  CHECK(runs > 250);
  for (const auto& [key, walk] : walks) {
    INFO("there is no key ppo.algorithm." << key);
    CHECK(std::ranges::count(algorithm_fields(), key, &config::FieldInfo::path) == 1);
  }
}

}  // namespace rlhf

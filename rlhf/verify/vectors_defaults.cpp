// Defaults of the frameworks against the presets that carry their names.

#include <functional>
#include <map>

#include "rlhf/config/reader.h"
#include "rlhf/core/error.h"
#include "rlhf/ppo/options.h"
#include "rlhf/ppo/preference_loss.h"
#include "rlhf/verify/golden_case.h"

namespace rlhf::verify {
namespace {

using namespace rlhf::ppo;
using nlohmann::json;
using Values = std::map<std::string, json>;

template <class T>
json optional_json(const std::optional<T>& value) {
  return value ? json(*value) : json();
}

/// 0 is how an option says "off" where the framework says null.
json off_as_null(double value) {
  return value == 0 ? json() : json(value);
}

const char* name_of(LrShape shape) {
  switch (shape) {
    case LrShape::kConstant:
      return "constant";
    case LrShape::kLinear:
      return "linear";
    case LrShape::kCosine:
      return "cosine";
    default:
      return "other";
  }
}

const char* name_of(KlEstimator estimator) {
  switch (estimator) {
    case KlEstimator::kK1:
      return "k1";
    case KlEstimator::kAbs:
      return "abs";
    case KlEstimator::kK2:
      return "k2";
    case KlEstimator::kK3:
      return "k3";
  }
  return "other";
}

Values trl_optimizer(const OptimizerOptions& o) {
  return {{"learning_rate", o.learning_rate},
          {"lr_scheduler_type", name_of(o.schedule.shape)},
          {"warmup_steps", o.schedule.warmup_steps},
          {"weight_decay", o.weight_decay},
          {"adam_beta1", o.beta1},
          {"adam_beta2", o.beta2},
          {"adam_epsilon", o.epsilon},
          {"max_grad_norm", o.max_grad_norm}};
}

Values trl_ppo() {
  const PpoOptions o = config::load_preset<PpoOptions>("trl-ppo");
  Values v = trl_optimizer(o.optimizer);
  v.erase("max_grad_norm");  // in the configuration, but its loop never clips
  v["num_mini_batches"] = o.mini_batches;
  v["num_ppo_epochs"] = o.epochs;
  v["missing_eos_penalty"] = optional_json(o.reward.score.missing_eos_penalty);
  v["whiten_rewards"] = o.reward.whiten;
  v["kl_coef"] = o.kl.coefficient;
  v["kl_estimator"] = name_of(o.kl.estimator.estimator);
  v["cliprange"] = o.policy.clip_low == o.policy.clip_high ? json(o.policy.clip_high) : json();
  v["vf_coef"] = o.value.coefficient;
  v["cliprange_value"] = o.value.clip_range;
  v["gamma"] = o.advantage.gae.gamma;
  v["lam"] = o.advantage.gae.lambda;
  return v;
}

Values trl_grpo() {
  const PpoOptions o = config::load_preset<PpoOptions>("trl-grpo");
  Values v = trl_optimizer(o.optimizer);
  v["num_generations"] = o.samples_per_prompt;
  v["num_iterations"] = o.epochs;
  v["beta"] = o.policy.kl.coefficient;
  v["epsilon"] = o.policy.clip_low;
  v["epsilon_high"] = o.policy.clip_high == o.policy.clip_low ? json() : json(o.policy.clip_high);
  v["delta"] = off_as_null(o.policy.ratio_cap);
  v["sapo_temperature_pos"] = o.policy.sapo_tau_positive;
  v["sapo_temperature_neg"] = o.policy.sapo_tau_negative;
  v["vespo_k_pos"] = o.policy.vespo.k_positive;
  v["vespo_lambda_pos"] = o.policy.vespo.lambda_positive;
  v["vespo_k_neg"] = o.policy.vespo.k_negative;
  v["vespo_lambda_neg"] = o.policy.vespo.lambda_negative;
  v["importance_sampling_level"] = o.policy.ratio_level == RatioLevel::kToken ? "token" : "sequence";
  const GroupScale scale = o.advantage.group.scale;
  v["scale_rewards"] = scale == GroupScale::kGroup ? "group" : scale == GroupScale::kBatch ? "batch" : "none";
  v["loss_type"] = o.policy.aggregation.mode == Aggregation::kTokenMean ? "dapo" : "other";
  v["mask_truncated_completions"] = o.reward.mask_truncated;
  v["top_entropy_quantile"] = o.policy.top_entropy_quantile;
  v["entropy_coef"] = o.policy.entropy_coefficient;
  v["off_policy_mask_threshold"] = optional_json(o.policy.off_policy_threshold);
  v["use_bias_correction_kl"] = o.policy.kl.ratio_weighted;
  v["vllm_importance_sampling_correction"] = o.correction.level != CorrectionLevel::kOff;
  const bool sequence_mask =
      o.correction.level == CorrectionLevel::kSequenceProduct && o.correction.mode == CorrectionMode::kMask;
  v["vllm_importance_sampling_mode"] = sequence_mask ? "sequence_mask" : "other";
  v["vllm_importance_sampling_clip_max"] = o.correction.upper;
  v["vllm_importance_sampling_clip_min"] = off_as_null(o.correction.lower);
  return v;
}

Values trl_rloo() {
  const PpoOptions o = config::load_preset<PpoOptions>("trl-rloo");
  Values v = trl_optimizer(o.optimizer);
  v["num_generations"] = o.samples_per_prompt;
  v["num_iterations"] = o.epochs;
  v["beta"] = o.kl.coefficient;
  v["epsilon"] = o.policy.clip_low;
  v["epsilon_high"] = o.policy.clip_high == o.policy.clip_low ? json() : json(o.policy.clip_high);
  v["normalize_advantages"] = o.advantage.whitening != Whitening::kNone;
  v["reward_clip_range"] = optional_json(o.reward.score.clip_max);
  v["mask_truncated_completions"] = o.reward.mask_truncated;
  return v;
}

Values trl_preference() {
  const PreferenceOptions o;
  return {{"beta", o.beta},
          {"label_smoothing", o.label_smoothing},
          {"f_alpha_divergence_coef", o.alpha},
          {"discopop_tau", o.discopop_tau},
          {"ld_alpha", optional_json(o.length_desensitisation)},
          {"loss_weights", json()},
          {"loss_type",
           o.terms.size() == 1 && o.terms[0].kind == PreferenceKind::kSigmoid ? json({"sigmoid"}) : json()},
          {"f_divergence_type", o.divergence == PreferenceDivergence::kReverseKl ? "reverse_kl" : "other"}};
}

Values trl_kto() {
  const UnpairedOptions o;
  return {{"beta", o.beta},
          {"desirable_weight", o.desirable_weight},
          {"undesirable_weight", o.undesirable_weight},
          {"loss_type", o.kind == UnpairedKind::kKto ? "kto" : "other"}};
}

Values trl_reward() {
  return {{"center_rewards_coefficient", off_as_null(RewardModelLossOptions{}.centring)}};
}

Values openrlhf() {
  const PpoOptions o = config::load_preset<PpoOptions>("openrlhf-ppo");
  Values v;
  for (const auto& [prefix, optimizer] :
       {std::pair<std::string, const OptimizerOptions*>("actor.", &o.optimizer),
        {"critic.", &o.critic_optimizer}}) {
    v[prefix + "adam.lr"] = optimizer->learning_rate;
    v[prefix + "adam.betas"] = {optimizer->beta1, optimizer->beta2};
    v[prefix + "adam.eps"] = optimizer->epsilon;
    v[prefix + "adam.weight_decay"] = optimizer->weight_decay;
    v[prefix + "lr_scheduler"] =
        optimizer->schedule.shape == LrShape::kCosine ? "cosine_with_min_lr" : "other";
    v[prefix + "lr_warmup_ratio"] = optimizer->schedule.warmup_ratio;
    v[prefix + "min_lr_ratio"] = optimizer->schedule.min_ratio;
    v[prefix + "max_norm"] = optimizer->max_grad_norm;
  }
  v["rollout.batch_size"] = o.prompts_per_step;
  v["rollout.n_samples_per_prompt"] = o.samples_per_prompt;
  v["train.batch_size"] = o.prompts_per_step * o.samples_per_prompt / o.mini_batches;
  v["train.max_epochs"] = o.epochs;
  v["actor.eps_clip"] = o.policy.clip_low;
  v["actor.eps_clip_low_high"] =
      o.policy.clip_low == o.policy.clip_high ? json() : json({o.policy.clip_low, o.policy.clip_high});
  v["actor.dual_clip"] = off_as_null(o.policy.dual_clip);
  v["actor.entropy_coef"] = off_as_null(o.policy.entropy_coefficient);
  v["actor.policy_loss_type"] = o.policy.ratio_level == RatioLevel::kToken ? "ppo" : "gspo";
  v["actor.loss_agg_mode"] = o.policy.aggregation.mode == Aggregation::kTokenMean ? "token-mean" : "other";
  v["critic.value_clip"] = o.value.clip_range;
  v["algo.advantage.estimator"] = o.advantage.form == AdvantageForm::kGae ? "gae" : "other";
  v["algo.advantage.gamma"] = o.advantage.gae.gamma;
  v["algo.advantage.lambd"] = o.advantage.gae.lambda;
  v["algo.advantage.no_std_norm"] = o.advantage.whitening == Whitening::kCentre;
  v["algo.advantage.is_correction_level"] = o.correction.level == CorrectionLevel::kOff ? "off" : "other";
  v["algo.kl.init_coef"] = o.kl.coefficient;
  v["algo.kl.estimator"] = name_of(o.kl.estimator.estimator);
  v["algo.kl.horizon"] = o.kl.controller.horizon;
  v["algo.kl.target"] =
      o.kl.controller.kind == KlControllerKind::kFixed ? json() : json(o.kl.controller.target);
  v["algo.kl.use_loss"] = o.policy.kl.coefficient > 0;
  v["algo.kl.unbiased_gradient"] = o.policy.kl.estimator.gradient == KlGradient::kWeightedK2;
  v["algo.dynamic_filtering_enable"] = o.dynamic_sampling.enabled;
  v["reward.clip_range"] = {o.reward.score.clip_min.value_or(0), o.reward.score.clip_max.value_or(0)};
  v["reward.overlong_buffer_len"] = off_as_null(static_cast<double>(o.reward.length.overlong_buffer));
  v["reward.overlong_penalty_factor"] = o.reward.length.overlong_factor;
  v["reward.stop_properly_penalty_coef"] = optional_json(o.reward.length.truncated_score);
  return v;
}

json verl_optimizer(const OptimizerOptions& o) {
  return {{"optimizer", "AdamW"},
          {"lr", o.learning_rate},
          {"lr_warmup_steps_ratio", o.schedule.warmup_ratio},
          {"weight_decay", o.weight_decay},
          {"betas", {o.beta1, o.beta2}},
          {"clip_grad", o.max_grad_norm},
          {"min_lr_ratio", o.schedule.min_ratio},
          {"num_cycles", o.schedule.cycles},
          {"lr_scheduler_type", name_of(o.schedule.shape)}};
}

Values verl_actor() {
  const PpoOptions o = config::load_preset<PpoOptions>("verl-ppo");
  return {{"ppo_mini_batch_size", o.prompts_per_step / o.mini_batches},
          {"ppo_epochs", o.epochs},
          {"clip_ratio", o.policy.clip_low},
          {"clip_ratio_low", o.policy.clip_low},
          {"clip_ratio_high", o.policy.clip_high},
          {"clip_ratio_c", o.policy.dual_clip},
          {"loss_agg_mode", o.policy.aggregation.mode == Aggregation::kTokenMean ? "token-mean" : "other"},
          {"loss_scale_factor", off_as_null(o.policy.aggregation.scale)},
          {"entropy_coeff", o.policy.entropy_coefficient},
          {"use_kl_loss", o.policy.kl.coefficient > 0},
          {"kl_loss_type", o.policy.kl.estimator.estimator == KlEstimator::kK3 ? "low_var_kl" : "other"},
          {"kl_loss_coef", config::load_preset<PpoOptions>("verl-grpo").policy.kl.coefficient},
          {"grad_clip", o.optimizer.max_grad_norm},
          {"tau_pos", o.policy.sapo_tau_positive},
          {"tau_neg", o.policy.sapo_tau_negative},
          {"policy_loss",
           {{"loss_mode", o.policy.objective == PolicyObjective::kClip ? "vanilla" : "other"},
            {"clip_cov_ratio", o.policy.covariance.fraction},
            {"clip_cov_lb", o.policy.covariance.low},
            {"clip_cov_ub", o.policy.covariance.high},
            {"kl_cov_ratio", o.policy.covariance.fraction}}},
          {"optim", verl_optimizer(o.optimizer)}};
}

Values verl_critic() {
  const PpoOptions o = config::load_preset<PpoOptions>("verl-ppo");
  return {{"ppo_epochs", o.epochs},
          {"ppo_mini_batch_size", o.prompts_per_step / o.mini_batches},
          {"cliprange_value", o.value.clip_range},
          {"loss_agg_mode", o.value.aggregation.mode == Aggregation::kTokenMean ? "token-mean" : "other"},
          {"grad_clip", o.critic_optimizer.max_grad_norm},
          {"optim", verl_optimizer(o.critic_optimizer)}};
}

Values verl_algorithm() {
  const PpoOptions o = config::load_preset<PpoOptions>("verl-ppo");
  return {{"gamma", o.advantage.gae.gamma},
          {"lam", o.advantage.gae.lambda},
          {"adv_estimator", o.advantage.form == AdvantageForm::kGae ? "gae" : "other"},
          {"norm_adv_by_std_in_grpo",
           config::load_preset<PpoOptions>("verl-grpo").advantage.group.scale == GroupScale::kGroup},
          {"use_kl_in_reward", o.kl.placement != KlRewardPlacement::kNone},
          {"kl_penalty", o.kl.estimator.estimator == KlEstimator::kK1 ? "kl" : "other"},
          {"kl_ctrl",
           {{"type", o.kl.controller.kind == KlControllerKind::kFixed ? "fixed" : "adaptive"},
            {"kl_coef", o.kl.coefficient},
            {"horizon", o.kl.controller.horizon},
            {"target_kl", o.kl.controller.target}}},
          {"rollout_correction",
           {{"rollout_is", o.correction.level == CorrectionLevel::kOff ? json() : json("other")},
            {"rollout_is_threshold", o.correction.upper},
            {"rollout_rs", o.correction.rejection.empty() ? json() : json(o.correction.rejection)},
            {"rollout_rs_threshold",
             o.correction.rejection_threshold.empty() ? json() : json(o.correction.rejection_threshold)},
            {"bypass_mode", o.correction.bypass},
            {"rollout_is_batch_normalize", o.correction.batch_normalize}}}};
}

/// Keys of the frameworks that are no part of the algorithm (hardware, files, logging) or that belong to the
/// run rather than to a preset. They are read and not compared.
const std::set<std::string>& outside_presets() {
  static const std::set<std::string> kKeys = {
      // TRL: batch plumbing, precision, generation of the run
      "per_device_train_batch_size", "num_train_epochs", "max_steps", "optim", "gradient_accumulation_steps",
      "bf16", "fp16", "gradient_checkpointing", "seed", "total_episodes", "local_rollout_forward_batch_size",
      "response_length", "stop_token", "stop_token_id", "temperature", "disable_dropout",
      "max_completion_length", "steps_per_generation", "top_p", "top_k", "min_p", "repetition_penalty",
      "reward_weights", "multi_objective_aggregation", "sync_ref_model", "ref_model_mixup_alpha",
      "ref_model_sync_steps", "max_length", "use_weighting",
      // verl
      "shuffle", "n", "prompt_length", "calculate_log_probs", "train_batch_size", "max_prompt_length",
      "max_response_length", "critic_warmup", "total_epochs", "policy_loss.ppo_kl_coef",
      "policy_loss.dro_beta", "optim.optimizer_impl", "optim.total_training_steps", "optim.lr_warmup_steps",
      "optim.zero_indexed_step", "optim.warmup_style", "optim.override_optimizer_config",
      "rollout_correction.loss_type",
      // OpenRLHF
      "algo.advantage.is_correction_mode", "algo.advantage.is_correction_gating",
      "algo.advantage.is_correction_threshold", "algo.dynamic_filtering_range", "critic.freezing_steps",
      "critic.save_value_network", "rollout.top_p", "rollout.temperature", "rollout.max_new_tokens",
      "rollout.micro_batch_size", "rollout.max_tokens_per_gpu", "rollout.vllm_generate_batch_size",
      "actor.aux_loss_coef", "actor.optim", "critic.optim", "actor.model_name_or_path",
      "critic.model_name_or_path", "reward.model_name_or_path", "reward.remote_url", "reward.offload",
      "reward.normalize_enable", "reward.num_nodes", "reward.num_gpus_per_node", "actor.num_nodes",
      "actor.num_gpus_per_node", "critic.num_nodes", "critic.num_gpus_per_node",
      "actor.freeze_visual_encoder", "actor.gradient_checkpointing_enable",
      "actor.gradient_checkpointing_reentrant"};
  return kKeys;
}

bool is_outside(const std::string& key) {
  if (outside_presets().contains(key)) return true;
  // Whole sections that have nothing to do with the algorithm.
  for (const char* section : {"data.", "train.", "actor.muon.", "critic.muon."}) {
    if (key.rfind(section, 0) == 0) return true;
  }
  return false;
}

bool same(const json& actual, const json& expected) {
  if (actual.is_number() && expected.is_number()) {
    return std::abs(actual.get<double>() - expected.get<double>()) <=
           1e-12 * std::abs(expected.get<double>());
  }
  if (actual.is_array() && expected.is_array() && actual.size() == expected.size()) {
    for (std::size_t i = 0; i < actual.size(); ++i) {
      if (!same(actual[i], expected[i])) return false;
    }
    return true;
  }
  return actual == expected;
}

void compare_values(GoldenCase& golden, const std::string& prefix, const json& expected, const json& actual) {
  for (const auto& [key, value] : expected.items()) {
    const std::string path = prefix + key;
    if (actual.contains(key)) {
      if (value.is_object()) {
        compare_values(golden, path + ".", value, actual[key]);
      } else if (!same(actual[key], value)) {
        golden.fail_with(path + " is " + actual[key].dump() + " in the preset, expected " + value.dump());
      }
    } else if (!is_outside(path)) {
      golden.fail_with("default '" + path + "' is not known");
    }
  }
}

}  // namespace

void check_defaults(GoldenCase& golden, const nlohmann::json& source) {
  static const std::map<std::string, std::function<Values()>> kCases = {
      {"trl/PPOConfig", trl_ppo},
      {"trl/GRPOConfig", trl_grpo},
      {"trl/RLOOConfig", trl_rloo},
      {"trl/DPOConfig", trl_preference},
      {"trl/KTOConfig", trl_kto},
      {"trl/RewardConfig", trl_reward},
      {"trl/SFTConfig",
       [] {
         return Values{{"loss_type", "nll"}};
       }},
      {"openrlhf/train_ppo_ray", openrlhf},
      {"verl/actor_rollout_ref.actor", verl_actor},
      {"verl/actor_rollout_ref.rollout", [] { return Values{}; }},
      {"verl/critic", verl_critic},
      {"verl/algorithm", verl_algorithm},
      {"verl/data",
       [] {
         return Values{{"train_batch_size", config::load_preset<PpoOptions>("verl-ppo").prompts_per_step}};
       }},
      {"verl/trainer", [] { return Values{}; }}};
  const auto it = kCases.find(package_of(source) + "/" + golden.name());
  RLHF_CHECK(it != kCases.end(), "defaults of ", package_of(source), " ", golden.name(), " are not known");
  Values values = it->second();
  // Classes without a preset of their own: their optimizer belongs to the stage that uses the loss.
  const std::set<std::string> stages = {"trl/DPOConfig", "trl/KTOConfig", "trl/RewardConfig",
                                        "trl/SFTConfig"};
  json expected = golden.outputs();
  if (stages.contains(it->first)) {
    for (const auto& [key, value] : trl_optimizer({})) expected.erase(key);
  }
  if (it->first == "trl/PPOConfig") expected.erase("max_grad_norm");
  compare_values(golden, "", expected, json(values));
}

}  // namespace rlhf::verify

#include "rlhf/train/run_options.h"

#include <algorithm>
#include <array>

#include "rlhf/core/error.h"
#include "rlhf/kernels/cuda_device.h"

namespace rlhf {
namespace {

constexpr std::array kStages = {
    Stage::kPretrain,         Stage::kSft, Stage::kReward, Stage::kPreference, Stage::kRejectionSampling,
    Stage::kOnlinePreference, Stage::kPpo, Stage::kEval};

std::string stage_names() {
  std::string names;
  for (Stage stage : kStages) names += (names.empty() ? "" : ", ") + std::string(to_string(stage));
  return names;
}

}  // namespace

const char* to_string(Stage stage) {
  switch (stage) {
    case Stage::kPretrain:
      return "pretrain";
    case Stage::kSft:
      return "sft";
    case Stage::kReward:
      return "reward";
    case Stage::kPreference:
      return "preference";
    case Stage::kRejectionSampling:
      return "rejection_sampling";
    case Stage::kOnlinePreference:
      return "online_preference";
    case Stage::kPpo:
      return "ppo";
    case Stage::kEval:
      return "eval";
  }
  return "unknown";
}

const char* to_string(Sharding sharding) {
  switch (sharding) {
    case Sharding::kNone:
      return "none";
    case Sharding::kOptimizer:
      return "optimizer";
    case Sharding::kGradients:
      return "gradients";
    case Sharding::kWeights:
      return "weights";
  }
  return "unknown";
}

bool PpoStageOptions::corrects_rounding(const RolloutOptions& rollout) const {
  const ppo::RolloutCorrectionOptions& own = algorithm.correction;
  return rollout.is_rounded() && weight_mismatch == WeightMismatch::kTruncate &&
         own.level == ppo::CorrectionLevel::kOff && own.rejection.empty() && !own.bypass;
}

bool RunOptions::needs_pairs() const {
  return (has_stage(Stage::kReward) && !needs_ratings()) || (has_stage(Stage::kPreference) && !has_labels());
}

bool RunOptions::needs_ratings() const {
  return has_stage(Stage::kReward) && reward.reading.target != RewardTarget::kPairs;
}

bool RunOptions::has_stage(Stage stage) const {
  return std::find(stages.begin(), stages.end(), to_string(stage)) != stages.end();
}

bool RunOptions::needs_prompts() const {
  return has_stage(Stage::kRejectionSampling) || has_stage(Stage::kOnlinePreference) ||
         has_stage(Stage::kPpo);
}

void RewardSection::validate(config::Problems& problems) const {
  term.validate(problems);
  if (type == Type::kHttp && !http) problems.add("http", "type: http needs a server: http: {url: ...}");
  if (type != Type::kHttp && http) problems.add("http", "is for type: http only");
}

// What every stage that samples and judges responses needs.
void RunOptions::validate_sampling(config::Problems& problems, Stage stage,
                                   double reward_model_weight) const {
  if (!has_stage(stage)) return;
  const std::string name = to_string(stage);
  if (reward_model_weight != 0 && !has_stage(Stage::kReward))
    problems.add(name + ".reward_model_weight", "needs the stage 'reward'");
  if (rollout.sampling.temperature == 0)
    problems.add("rollout.sampling.temperature",
                 name + " needs sampled responses: the temperature must be above 0");
  const bool taught = stage == Stage::kPpo && has_teacher();
  if (data.source == DataSource::kFiles && rewards.empty() && reward_model_weight == 0 && !taught)
    problems.add("rewards", name + " on files needs a rule reward, or " + name +
                                ".reward_model_weight and the stage 'reward'");
}

// Ratings come from files, and only some of what is made of pairs can be made of them.
void RunOptions::validate_ratings(config::Problems& problems) const {
  if (needs_ratings() && data.source != DataSource::kFiles)
    problems.add("reward.target", "scores and steps need data.source: files with data.ratings_file");
  if (!needs_ratings() && !(data.ratings_file.empty() && data.held_out_ratings_file.empty()))
    problems.add("data.ratings_file", "only the stage 'reward' with target: scores or steps reads ratings");
  if (ppo.step_rewards && reward.reading.target != RewardTarget::kSteps)
    problems.add("ppo.step_rewards", "needs reward.target: steps");
  if (ppo.critic_init == CriticInit::kReward && reward.reading.num_outputs() > 1)
    problems.add("ppo.critic_init", "a reward model of several objectives has no single value to start from");
}

namespace {

std::string reward_key(std::size_t i, const char* key) {
  return concat("rewards.", i, '.', key);
}

}  // namespace

std::string RunOptions::whole_batch_key() const {
  if (const char* key = ppo::whole_batch_key(ppo.algorithm)) return std::string("ppo.algorithm.") + key;
  for (std::size_t i = 0; i < rewards.size(); ++i)
    if (rewards[i].term.normalize == TermNormalization::kRunning) return reward_key(i, "normalize");
  return "";
}

// What terms' options cannot go with.
void RunOptions::validate_rewards(config::Problems& problems) const {
  const bool ranks = has_stage(Stage::kRejectionSampling) || has_stage(Stage::kOnlinePreference);
  for (std::size_t i = 0; i < rewards.size(); ++i) {
    if (rewards[i].term.on_failure == OnFailure::kDrop && ranks)
      problems.add(reward_key(i, "on_failure"),
                   "drop is for the stage ppo; rejection_sampling and online_preference take stop or score");
    const TermNormalization normalize = rewards[i].term.normalize;
    if (normalize == TermNormalization::kNone) continue;
    if (has_stage(Stage::kPpo) && ppo.algorithm.advantage.greedy_baseline)
      problems.add(
          reward_key(i, "normalize"),
          "goes with no ppo.algorithm.advantage.greedy_baseline, which compares the scores themselves");
    if (normalize == TermNormalization::kGroup && has_stage(Stage::kPpo) &&
        ppo.algorithm.samples_per_prompt < 2)
      problems.add(
          reward_key(i, "normalize"),
          "group needs ppo.algorithm.samples_per_prompt of at least 2: a response alone is its own mean");
    if (normalize == TermNormalization::kRunning && ranks)
      problems.add(
          reward_key(i, "normalize"),
          "running is for the stage ppo; rejection_sampling and online_preference take none or group");
  }
}

void RunOptions::validate(config::Problems& problems) const {
  std::size_t next = 0;
  for (const std::string& name : stages) {
    const auto known =
        std::find_if(kStages.begin(), kStages.end(), [&](Stage s) { return name == to_string(s); });
    if (known == kStages.end()) {
      problems.add("stages", "'" + name + "' is no stage; expected one of " + stage_names());
      continue;
    }
    const auto position = static_cast<std::size_t>(known - kStages.begin());
    if (position < next)
      problems.add("stages", "'" + name + "' is out of order or given twice; the order is " + stage_names());
    next = position + 1;
  }
  if (stages.empty()) problems.add("stages", "there is nothing to do: give at least one stage");
  validate_sampling(problems, Stage::kRejectionSampling, rejection_sampling.sampler.reward_model_weight);
  validate_sampling(problems, Stage::kOnlinePreference, online_preference.sampler.reward_model_weight);
  validate_sampling(problems, Stage::kPpo, ppo.reward_model_weight);
  if (rollout.environment && data.source != DataSource::kFiles)
    problems.add("rollout.environment", "needs data.source: files");
  if (has_stage(Stage::kPpo) && ppo.critic_init == CriticInit::kReward && !has_stage(Stage::kReward))
    problems.add("ppo.critic_init", "'reward' needs the stage 'reward'");
  if (has_stage(Stage::kPpo) && rollout.is_rounded() && ppo.old_log_probs == OldLogProbs::kRollout)
    problems.add("ppo.old_log_probs",
                 concat("'rollout' needs rollout.weights: fp32 and rollout.kv_dtype: auto, where both "
                        "log-probs are equal; ",
                        rollout.rounding_text(),
                        ": use auto, and ppo.algorithm.correction.bypass to form the ratio against the "
                        "sampler's"));
  const auto needs_file = [&](Stage stage, const std::string& file, const char* key) {
    if (data.source == DataSource::kFiles && has_stage(stage) && file.empty())
      problems.add(std::string("data.") + key,
                   std::string("the stage '") + to_string(stage) + "' needs this file");
  };
  needs_file(Stage::kPretrain, data.sft_file, "sft_file");
  needs_file(Stage::kSft, data.sft_file, "sft_file");
  if (needs_ratings())
    needs_file(Stage::kReward, data.ratings_file, "ratings_file");
  else
    needs_file(Stage::kReward, data.pairs_file, "pairs_file");
  validate_ratings(problems);
  if (!has_labels()) needs_file(Stage::kPreference, data.pairs_file, "pairs_file");
  if (!data.labels_file.empty() &&
      (data.source != DataSource::kFiles || !has_stage(Stage::kPreference) || !preference.unpaired))
    problems.add("data.labels_file",
                 "only preference.unpaired of the stage 'preference' on data.source: files reads labels");
  for (Stage stage : {Stage::kRejectionSampling, Stage::kOnlinePreference, Stage::kPpo})
    needs_file(stage, data.prompts_file, "prompts_file");
  needs_file(Stage::kEval, data.eval_file, "eval_file");
  for (Stage stage : {Stage::kReward, Stage::kPreference})
    if (data.source == DataSource::kRandomWalks && has_stage(stage))
      problems.add("stages",
                   std::string("data.source: random_walks has no preference pairs for the stage '") +
                       to_string(stage) + "'");
  if (data.source == DataSource::kRandomWalks &&
      (!model.new_model || model.new_model->vocabulary != NewModelOptions::Vocabulary::kLetters))
    problems.add("model.new.vocabulary",
                 "data.source: random_walks needs a new model with the vocabulary 'letters'");
  if (has_stage(Stage::kPpo) && has_teacher() == distillation.teacher.empty())
    problems.add("distillation.teacher", has_teacher()
                                             ? "ppo.algorithm.distillation.coefficient needs a teacher"
                                             : "is not used: ppo.algorithm.distillation.coefficient is 0");
  if (has_stage(Stage::kPpo) && ppo.algorithm.dynamic_sampling.enabled && data.source == DataSource::kFiles &&
      rewards.empty())
    problems.add("ppo.algorithm.dynamic_sampling.enabled",
                 "looks at the spread of rule rewards, and there are none: give rewards");
  validate_rewards(problems);
  const std::string whole_batch = whole_batch_key();
  if (has_stage(Stage::kPpo) && schedule.require_early_training && !whole_batch.empty())
    problems.add("schedule.require_early_training",
                 "excludes " + whole_batch + ", which needs the whole batch before any training");
  if (device == Device::kCuda)
    if (const CudaStatus gpu = cuda_status(); !gpu.usable)
      problems.add("device", "no GPU can be used: " + gpu.text + "; use cpu or auto");
}

}  // namespace rlhf

template rlhf::config::Schema rlhf::config::Schema::of(rlhf::RunOptions&);

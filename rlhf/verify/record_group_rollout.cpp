#include "rlhf/verify/record_group_rollout.h"

#include <algorithm>
#include <cmath>

#include "rlhf/config/reader.h"
#include "rlhf/core/error.h"

namespace rlhf::verify {
namespace {

// Advantage stage and loss. Rewards are a weighted sum of functions, so that the score is one number.
void read_grpo(GoldenCase& golden, GroupRecordOptions& o) {
  o.algorithm = config::load_preset<ppo::PpoOptions>("trl-grpo");
  o.algorithm.correction = {};  // the sampler is the trainer's own model
  o.loss_type = trl_loss_type(golden.text("loss_type"));
  o.algorithm.policy = trl_policy_options(golden, o.loss_type);
  o.algorithm.advantage.group = trl_group_options(golden, "grpo");
}

void read_rloo(GoldenCase& golden, GroupRecordOptions& o) {
  o.algorithm = config::load_preset<ppo::PpoOptions>("trl-rloo");
  ppo::PolicyLossOptions& policy = o.algorithm.policy;
  policy.clip_low = golden.number("epsilon");
  policy.clip_high = golden.number("epsilon_high", policy.clip_low);
  o.loss_type = {policy.objective, policy.aggregation.mode, false};
  o.algorithm.advantage.group = trl_group_options(golden, "rloo");
  o.algorithm.reward.score = trl_score_options(golden);
  o.algorithm.kl.coefficient = o.beta;
}

bool advantages_from_one_score(GoldenCase& golden, const GroupRecordOptions& options,
                               const std::vector<double>& scores) {
  if (options.rloo && golden.flag("normalize_advantages")) return false;
  if (!options.rloo && golden.text("multi_objective_aggregation") != "sum_then_normalize") return false;
  return std::all_of(scores.begin(), scores.end(), [](double score) { return std::isfinite(score); });
}

// The advantage stage of the trainer where one finite score per response says it all; otherwise (several
// normalised terms, missing rewards, normalised RLOO advantages) the advantages of the responses on their
// tokens.
void compute_token_advantages(GoldenCase& golden, const GroupRecordOptions& options,
                              const std::vector<double>& scores, Tolerance tolerance, GroupRollout& rollout) {
  const ppo::TokenRows rows{rollout.tokens.offsets, {}};
  rollout.advantages = ppo::spread_over_tokens(rows, rollout.response_advantages);
  if (!advantages_from_one_score(golden, options, scores) || ppo::count_tokens(rows) == 0) return;
  const std::vector<std::uint64_t> groups = trl_groups(golden, options.batch);
  std::vector<ppo::ScoredResponse> responses(options.batch);
  for (std::size_t row = 0; row < responses.size(); ++row) {
    responses[row].log_probs = rollout.tokens.take(rollout.log_probs, {row});
    responses[row].reference_log_probs = rollout.tokens.take(rollout.reference_log_probs, {row});
    responses[row].score = scores[row];
    responses[row].group = groups[row];
    responses[row].ended = rollout.ended[row] != 0;
  }
  const ppo::Experience e = ppo::compute_experience(options.algorithm, options.beta, responses);
  golden.compare("advantages of the advantage stage", e.advantages, rollout.advantages, tolerance);
  if (golden.is_float32()) rollout.advantages = e.advantages;
}

std::vector<double> row_sums(const PaddedRows& rows, std::span<const double> values) {
  std::vector<double> sums;
  for (std::size_t row = 0; row < rows.rows(); ++row)
    sums.push_back(ppo::row_sum({rows.offsets, {}}, row, values));
  return sums;
}

std::vector<double> sequence_kl(const GroupRecordOptions& options, const GroupRollout& rollout) {
  std::vector<double> kl;
  for (std::size_t t = 0; t < rollout.log_probs.size(); ++t)
    kl.push_back(
        ppo::estimate_kl(options.algorithm.kl.estimator,
                         {rollout.log_probs[t], rollout.reference_log_probs[t], rollout.log_probs[t]})
            .value);
  return row_sums(rollout.tokens, kl);
}

void check_log_probs(GoldenCase& golden, RecordObject& event, const GroupRecordOptions& options,
                     Tolerance tolerance, GroupRollout& rollout) {
  const auto compare = [&](const char* key, const std::vector<double>& actual) {
    golden.compare(event.label() + "." + key, actual, rollout.tokens.strip(event.tensor(key)), tolerance);
  };
  rollout.has_old_log_probs = event.has("old_per_token_logps");
  // TRL leaves them out where the policy has not moved since.
  const bool moved = options.accumulation % (options.steps_per_generation * options.iterations) != 0;
  if (rollout.has_old_log_probs != (moved || options.rloo))
    event.fail_with("old log-probs do not go together with num_iterations and steps_per_generation");
  if (rollout.has_old_log_probs) compare("old_per_token_logps", rollout.log_probs);
  if (event.has("ref_per_token_logps") != (options.beta != 0))
    event.fail_with("reference log-probs and beta do not go together");
  if (options.beta != 0) compare("ref_per_token_logps", rollout.reference_log_probs);
}

}  // namespace

GroupRecordOptions read_group_record_options(GoldenCase& golden) {
  GroupRecordOptions o;
  o.rloo = !golden.has_param("loss_type");
  o.beta = golden.number("beta");
  o.rloo ? read_rloo(golden, o) : read_grpo(golden, o);
  o.optimizer = trl_optimizer(golden);
  o.algorithm.reward.mask_truncated = golden.flag("mask_truncated_completions");
  o.temperature = golden.number("temperature");
  o.pad = static_cast<TokenId>(golden.number("pad_token_id"));
  o.end = static_cast<TokenId>(golden.number("eos_token_id"));
  o.batch = golden.count("generation_batch_size");
  o.micro_batch = golden.count("per_device_train_batch_size");
  o.accumulation = golden.count("gradient_accumulation_steps");
  o.steps_per_generation = golden.count("steps_per_generation");
  o.iterations = golden.count("num_iterations");
  o.max_steps = golden.count("max_steps");
  o.max_completion_length = golden.count("max_completion_length");
  RLHF_CHECK(o.micro_batch * o.steps_per_generation == o.batch, "generation_batch_size ", o.batch,
             " is not per_device_train_batch_size times steps_per_generation");
  return o;
}

GroupRollout read_group_rollout(RecordObject& event, const GroupRecordOptions& options) {
  const Tensor prompts = event.tensor("prompt_ids"), prompt_mask = event.tensor("prompt_mask");
  const Tensor completions = event.tensor("completion_ids");
  RLHF_CHECK(completions.shape.size() == 2 && completions.shape[0] == options.batch &&
                 prompts.shape == prompt_mask.shape && prompts.shape.at(0) == options.batch,
             event.label(), ": prompts and completions must have ", options.batch, " rows");
  const std::size_t width = completions.shape[1];
  RLHF_CHECK(width <= options.max_completion_length, event.label(), ": completions of ", width,
             " tokens exceed max_completion_length");
  GroupRollout rollout;
  rollout.tokens.width = width;
  for (std::size_t row = 0; row < options.batch; ++row) {
    RecordResponse pair;
    const std::vector<TokenId> prompt = token_row(prompts, row);
    for (std::size_t t = 0; t < prompt.size(); ++t)
      if (prompt_mask.row(row)[t] != 0) pair.prompt.push_back(prompt[t]);
    rollout.padded_prompts |= pair.prompt.size() < prompt.size();
    const std::vector<TokenId> completion = token_row(completions, row);
    rollout.completions.push_back(completion);
    const auto end = std::find(completion.begin(), completion.end(), options.end);
    rollout.ended.push_back(end != completion.end());
    const auto length =
        end == completion.end() ? width : static_cast<std::size_t>(end - completion.begin()) + 1;
    // TRL takes a completion whose last token is padding for finished too.
    const bool truncated = !rollout.ended.back() && completion.back() != options.pad;
    rollout.dropped.push_back(options.algorithm.reward.mask_truncated && truncated);
    rollout.tokens.add_row(rollout.dropped.back() ? 0 : length);
    pair.response.assign(completion.begin(),
                         completion.begin() + static_cast<std::ptrdiff_t>(rollout.tokens.length(row)));
    rollout.responses.push_back(std::move(pair));
  }
  event.check_exact("completion_mask",
                    rollout.tokens.pad(std::vector<double>(rollout.tokens.offsets.back(), 1.0), 0));
  return rollout;
}

void check_group_rollout(GoldenCase& golden, RecordObject& event, const GroupRecordOptions& options,
                         Tolerance tolerance, GroupRollout& rollout) {
  check_log_probs(golden, event, options, tolerance, rollout);
  TrlRewards rewards;
  rewards.trainer = options.rloo ? "rloo" : "grpo";
  rewards.terms = trl_reward_terms(golden, event.tensor("rewards_per_func"));
  const std::vector<double> scores = ppo::combine_terms(rewards.terms);
  RLHF_CHECK(scores.size() == options.batch, event.label(), ": ", scores.size(), " rewards for ",
             options.batch, " responses");
  event.check("rewards", scores, tolerance);
  if (options.rloo) {
    event.check("old_logps", row_sums(rollout.tokens, rollout.log_probs), tolerance);
    if (event.has("kl") != (options.beta != 0)) event.fail_with("kl and beta do not go together");
    if (options.beta != 0) {
      rewards.sequence_kl = sequence_kl(options, rollout);
      // A sum of differences of log-probs: its rounding has their scale.
      event.check("kl", rewards.sequence_kl, {tolerance.relative, tolerance.relative});
    }
  } else {
    event.check_exact("num_items_in_batch", static_cast<double>(rollout.tokens.offsets.back()));
  }
  rollout.response_advantages = trl_response_advantages(golden, rewards);
  // Rewards and advantages are float32 in TRL whatever the model is. A float64 run goes on with the recorded
  // ones, so that everything after them can be held to its own precision.
  const Tolerance single = golden.is_float32() ? tolerance : Tolerance{1e-6, 1e-6};
  event.check("advantages", rollout.response_advantages, single);
  if (!golden.is_float32()) rollout.response_advantages = event.tensor("advantages").values;
  compute_token_advantages(golden, options, scores, single, rollout);
}

GroupMicroBatch read_group_micro_batch(RecordObject& event, const GroupRecordOptions& options,
                                       Tolerance tolerance, GroupRollout& rollout) {
  const Tensor completions = event.tensor("completion_ids");
  const std::vector<double> advantages = event.tensor("advantages").values;
  RLHF_CHECK(completions.shape.size() == 2 && completions.shape[0] == options.micro_batch &&
                 advantages.size() == options.micro_batch,
             event.label(), ": expected ", options.micro_batch, " completions and advantages");
  GroupMicroBatch micro;
  for (std::size_t i = 0; i < options.micro_batch; ++i) {
    const std::vector<TokenId> completion = token_row(completions, i);
    std::size_t found = options.batch;
    for (std::size_t row = 0; row < options.batch && found == options.batch; ++row)
      if (rollout.unused[row] && rollout.completions[row] == completion &&
          std::abs(rollout.response_advantages[row] - advantages[i]) <=
              tolerance.relative * (1 + std::abs(advantages[i])))
        found = row;
    RLHF_CHECK(found < options.batch, event.label(), ": completion ", i,
               " with its advantage is not among the rollout's rows that are left");
    rollout.unused[found] = 0;
    micro.rows.push_back(found);
    micro.responses.push_back(rollout.responses[found]);
    micro.response_advantages.push_back(rollout.response_advantages[found]);
  }
  event.check("advantages", micro.response_advantages, tolerance);
  micro.tokens = rollout.tokens.select(micro.rows);
  micro.old_log_probs = rollout.tokens.take(rollout.log_probs, micro.rows);
  micro.reference_log_probs = rollout.tokens.take(rollout.reference_log_probs, micro.rows);
  micro.advantages = rollout.tokens.take(rollout.advantages, micro.rows);
  return micro;
}

namespace {

// One value for each response with tokens, which all its tokens have.
std::vector<double> per_response(const GroupMicroBatch& micro, const std::vector<double>& flat) {
  std::vector<double> values;
  for (std::size_t row = 0; row < micro.tokens.rows(); ++row)
    if (micro.tokens.length(row) > 0) values.push_back(flat[micro.tokens.offsets[row]]);
  return values;
}

// The same responses of a list over all of them.
std::vector<double> listed_per_response(const GroupMicroBatch& micro, const Tensor& listed) {
  RLHF_CHECK(listed.values.size() == micro.tokens.rows(), listed.values.size(), " values for ",
             micro.tokens.rows(), " responses");
  std::vector<double> values;
  for (std::size_t row = 0; row < micro.tokens.rows(); ++row)
    if (micro.tokens.length(row) > 0) values.push_back(listed.values[row]);
  return values;
}

// Compares values that TRL lists per token, or per response where all tokens of one have the same.
void check_terms(GoldenCase& golden, RecordObject& event, const std::string& key,
                 const GroupMicroBatch& micro, const std::vector<double>& flat, Tolerance tolerance) {
  const Tensor listed = event.tensor(key);
  const bool per_token = listed.shape.size() == 2 && listed.shape[1] == micro.tokens.width;
  golden.compare(event.label() + "." + key, per_token ? flat : per_response(micro, flat),
                 per_token ? micro.tokens.strip(listed) : listed_per_response(micro, listed), tolerance);
}

}  // namespace

void check_group_terms(GoldenCase& golden, RecordObject& event, const GroupRecordOptions& options,
                       Tolerance tolerance, const GroupMicroBatch& micro, const ppo::PolicyLossResult& loss) {
  const ppo::PolicyLossOptions& policy = options.algorithm.policy;
  std::vector<double> ratios = loss.ratios;
  if (policy.ratio_cap > 0)
    for (double& ratio : ratios) ratio = std::min(ratio, policy.ratio_cap);
  check_terms(golden, event, "coef_1", micro, ratios, tolerance);
  if (options.rloo) {
    event.check("logps", row_sums(micro.tokens, micro.log_probs), tolerance);
    return;
  }
  std::vector<double> terms = loss.token_losses;
  for (std::size_t t = 0; t < loss.token_kl.size(); ++t) terms[t] += policy.kl.coefficient * loss.token_kl[t];
  check_terms(golden, event, "per_token_loss", micro, terms, tolerance);
  if (event.has("per_token_kl") != (options.beta != 0))
    event.fail_with("per_token_kl and beta do not go together");
  // exp(d) - d - 1 of differences of rounded log-probs: its rounding has their scale.
  if (options.beta != 0)
    check_terms(golden, event, "per_token_kl", micro, loss.token_kl,
                {tolerance.relative, tolerance.relative});
}

double untrained_loss(const GroupRecordOptions& options, const GroupMicroBatch& micro) {
  double sum = 0;
  if (!options.rloo) return sum;
  for (std::size_t row = 0; row < micro.tokens.rows(); ++row)
    if (micro.tokens.length(row) == 0) sum -= micro.response_advantages[row];
  return sum / static_cast<double>(micro.tokens.rows());
}

}  // namespace rlhf::verify

#include "rlhf/verify/record_ppo_rollout.h"

#include <algorithm>
#include <map>

#include "rlhf/config/reader.h"
#include "rlhf/core/error.h"
#include "rlhf/verify/trl_options.h"

namespace rlhf::verify {
namespace {

// TRL divides logits by temperature + 1e-7.
constexpr double kTemperatureOffset = 1e-7;
// What TRL writes over log-probs of padding.
constexpr double kInvalidLogProb = 1.0;

ppo::KlEstimator kl_estimator(const std::string& name) {
  static const std::map<std::string, ppo::KlEstimator> kNames = {{"k1", ppo::KlEstimator::kK1},
                                                                 {"k3", ppo::KlEstimator::kK3}};
  const auto it = kNames.find(name);
  RLHF_CHECK(it != kNames.end(), "kl_estimator '", name, "' is not known");
  return it->second;
}

ppo::PpoOptions read_algorithm(GoldenCase& golden) {
  ppo::PpoOptions o = config::load_preset<ppo::PpoOptions>("trl-ppo");
  o.kl.coefficient = golden.number("kl_coef");
  o.kl.estimator.estimator = kl_estimator(golden.text("kl_estimator"));
  o.policy.clip_low = o.policy.clip_high = golden.number("cliprange");
  o.value.clip_range = golden.number("cliprange_value");
  RLHF_CHECK(o.value.clip_range > 0, "cliprange_value ", o.value.clip_range,
             " is not known: here a range of 0 turns the clip off");
  o.value.coefficient = golden.number("vf_coef");
  o.advantage.gae.gamma = golden.number("gamma");
  o.advantage.gae.lambda = golden.number("lam");
  o.reward.whiten = golden.flag("whiten_rewards");
  o.reward.score.missing_eos_penalty = golden.optional_number("missing_eos_penalty");
  o.optimizer = trl_optimizer(golden);
  return o;
}

std::optional<TokenId> stop_token(GoldenCase& golden, TokenId end) {
  const std::optional<double> id = golden.optional_number("stop_token_id");
  if (!golden.has_param("stop_token")) return id ? std::optional(static_cast<TokenId>(*id)) : std::nullopt;
  RLHF_CHECK(golden.text("stop_token") == "eos" && !id, "stop_token '", golden.text("stop_token"),
             "' is not known");
  return end;
}

std::vector<TokenId> without(TokenId token, std::vector<TokenId> tokens) {
  std::erase(tokens, token);
  return tokens;
}

std::size_t position_of(TokenId token, const std::vector<TokenId>& tokens) {
  return static_cast<std::size_t>(std::find(tokens.begin(), tokens.end(), token) - tokens.begin());
}

std::vector<double> as_numbers(const std::vector<TokenId>& tokens) {
  return {tokens.begin(), tokens.end()};
}

template <class V>
void append(std::vector<double>& all, const V& values) {
  all.insert(all.end(), values.begin(), values.end());
}

// 1 beyond the rows, 0 inside them.
std::vector<double> padding_of(const PaddedRows& rows) {
  return rows.pad(std::vector<double>(rows.offsets.back(), 0.0), 1.0);
}

std::vector<ppo::ScoredResponse> scored_responses(const PpoRollout& rollout) {
  const std::vector<double> log_probs = rollout.tokens.narrow(rollout.visible, rollout.log_probs);
  const std::vector<double> reference = rollout.tokens.narrow(rollout.visible, rollout.reference_log_probs);
  std::vector<ppo::ScoredResponse> responses(rollout.responses.size());
  for (std::size_t row = 0; row < responses.size(); ++row) {
    responses[row].log_probs = rollout.tokens.take(log_probs, {row});
    responses[row].reference_log_probs = rollout.tokens.take(reference, {row});
    responses[row].values = rollout.slots.take(rollout.values, {row});
    responses[row].score = rollout.scores[row];
    responses[row].ended = rollout.ended[row] != 0;
    responses[row].group = row;
  }
  return responses;
}

void check_kl(RecordObject& update, const PpoRecordOptions& options, Tolerance tolerance,
              const PpoRollout& rollout, std::vector<ppo::ScoredResponse> responses) {
  std::vector<double> kl;
  for (ppo::ScoredResponse& r : responses) {
    for (std::size_t t = 0; t < r.log_probs.size(); ++t)
      kl.push_back(ppo::estimate_kl(options.algorithm.kl.estimator,
                                    {r.log_probs[t], r.reference_log_probs[t], r.log_probs[t]})
                       .value);
    r.score = 0;
  }
  update.check("kl", rollout.tokens.pad(kl, 0), tolerance);
  // Token rewards of responses that score nothing are the KL part alone.
  ppo::PpoOptions kl_only = options.algorithm;
  kl_only.reward.score.missing_eos_penalty = std::nullopt;
  kl_only.reward.whiten = false;
  const ppo::Experience e = ppo::compute_experience(kl_only, kl_only.kl.coefficient, responses);
  update.check("non_score_reward", rollout.slots.pad(e.token_rewards, 0), tolerance);
}

}  // namespace

PpoRecordOptions read_ppo_record_options(GoldenCase& golden) {
  PpoRecordOptions o;
  o.algorithm = read_algorithm(golden);
  o.temperature = golden.number("temperature") + kTemperatureOffset;
  o.pad = static_cast<TokenId>(golden.number("pad_token_id"));
  o.end = static_cast<TokenId>(golden.number("eos_token_id"));
  o.stop = stop_token(golden, o.end);
  o.batch = golden.count("batch_size");
  o.micro_batch = golden.count("per_device_train_batch_size");
  o.accumulation = golden.count("gradient_accumulation_steps");
  o.mini_batches = golden.count("num_mini_batches");
  o.epochs = golden.count("num_ppo_epochs");
  o.updates = golden.count("num_total_batches");
  o.response_length = golden.count("response_length");
  o.mini_batch = golden.count("mini_batch_size");
  RLHF_CHECK(o.mini_batch * o.mini_batches == o.batch, "batch_size ", o.batch,
             " is not mini_batch_size times num_mini_batches");
  return o;
}

PpoRollout read_ppo_rollout(RecordObject& update, const PpoRecordOptions& options,
                            const std::set<std::vector<TokenId>>& prompts) {
  const Tensor queries = update.tensor("queries");
  const Tensor responses = update.tensor("responses");
  RLHF_CHECK(queries.shape.size() == 2 && responses.shape.size() == 2 && queries.shape[0] == options.batch &&
                 responses.shape[0] == options.batch,
             update.label(), ": queries and responses must have ", options.batch, " rows");
  const std::size_t width = responses.shape[1];
  RLHF_CHECK(width <= options.response_length, update.label(), ": responses of ", width,
             " tokens exceed response_length");
  PpoRollout rollout;
  rollout.tokens.width = rollout.slots.width = rollout.visible.width = width;
  std::vector<double> joined, truncated, lengths;
  for (std::size_t row = 0; row < options.batch; ++row) {
    const std::vector<TokenId> response = token_row(responses, row);
    append(joined, queries.row(row));
    append(joined, responses.row(row));
    std::vector<TokenId> kept = response;
    if (options.stop) {
      const std::size_t last = position_of(*options.stop, response);
      for (std::size_t t = last + 1; t < width; ++t) kept[t] = options.pad;
    }
    append(truncated, as_numbers(kept));
    const std::size_t length = position_of(options.pad, kept);
    lengths.push_back(static_cast<double>(length) - 1);  // TRL's is the index of the last kept token
    rollout.tokens.add_row(length);
    rollout.slots.add_row(std::min(length + 1, width));
    const std::size_t visible = std::min(position_of(options.pad, response) + 1, width);
    rollout.visible.add_row(visible);
    RecordResponse pair{without(options.pad, token_row(queries, row)), response};
    pair.response.resize(visible);
    if (!prompts.contains(pair.prompt)) update.fail_with(concat("query ", row, " is not in the data set"));
    rollout.responses.push_back(std::move(pair));
    rollout.ended.push_back(position_of(options.end, kept) < width);
    rollout.num_end_tokens += static_cast<double>(std::count(response.begin(), response.end(), options.end));
  }
  update.check_exact("query_responses", joined);
  update.check_exact("postprocessed_responses", truncated);
  update.check_exact("sequence_lengths", lengths);
  update.check_exact("context_length", static_cast<double>(queries.shape[1]));
  update.check_exact("contain_eos_token", std::vector<double>(rollout.ended.begin(), rollout.ended.end()));
  update.check_exact("padding_mask", padding_of(rollout.tokens));
  update.check_exact("padding_mask_p1", padding_of(rollout.slots));
  return rollout;
}

void check_ppo_experience(RecordObject& update, const PpoRecordOptions& options, Tolerance tolerance,
                          PpoRollout& rollout) {
  const std::vector<ppo::ScoredResponse> responses = scored_responses(rollout);
  check_kl(update, options, tolerance, rollout, responses);
  const double coefficient = options.algorithm.kl.coefficient;
  ppo::PpoOptions plain = options.algorithm;
  plain.reward.whiten = false;
  update.check("rewards_before_whitening",
               rollout.slots.pad(ppo::compute_experience(plain, coefficient, responses).token_rewards, 0),
               tolerance);

  ppo::Experience& e = rollout.experience;
  e = ppo::compute_experience(options.algorithm, coefficient, responses);
  const auto check_slots = [&](const char* key, const std::vector<double>& flat) {
    update.check(key, rollout.slots.pad(flat, 0), tolerance);
  };
  update.check("logprobs", rollout.tokens.pad(e.old_log_probs, kInvalidLogProb), tolerance);
  update.check("ref_logprobs", rollout.tokens.pad(e.reference_log_probs, kInvalidLogProb), tolerance);
  update.check("scores", e.scores, tolerance);
  check_slots("values", e.old_values);
  check_slots("rewards", e.token_rewards);
  check_slots("returns", e.returns);
  // Returns are the unwhitened advantages plus the values.
  std::vector<double> raw = e.returns;
  for (std::size_t t = 0; t < raw.size(); ++t) raw[t] -= e.old_values[t];
  check_slots("advantages_before_whitening", raw);
  update.check("advantages", rollout.tokens.pad(e.advantages, 0), tolerance);
}

}  // namespace rlhf::verify

#include "rlhf/train/ppo_trainer.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numeric>

#include "rlhf/core/error.h"
#include "rlhf/core/random.h"
#include "rlhf/ppo/policy_loss.h"
#include "rlhf/ppo/value_loss.h"
#include "rlhf/train/batching.h"
#include "rlhf/train/reward_model.h"

namespace rlhf {

using Pass = SequencePass<float>;

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

GenerationRequest make_request(const Prompt& prompt, const RolloutOptions& rollout,
                               const LanguageModel& model, const TaskData& data) {
  GenerationRequest request;
  request.prompt_id = prompt.id;
  request.prompt = prompt.tokens;
  request.sampling = rollout.sampling;
  request.stop.tokens = model.end_tokens();
  request.stop.strings = rollout.stop_strings;
  request.stop.max_new_tokens = rollout.max_new_tokens;
  request.tool = data.tool(prompt.task);
  return request;
}

std::unique_ptr<RolloutEngine> make_engine(const LanguageModel& model, const RolloutOptions& rollout,
                                           const std::vector<Prompt>& prompts,
                                           const Compute<float>& compute) {
  std::size_t longest = 1;
  for (const Prompt& prompt : prompts) longest = std::max(longest, prompt.tokens.size());
  RolloutEngineOptions options;
  options.max_sequences = rollout.max_sequences;
  options.max_tokens_per_step = rollout.max_tokens_per_step;
  options.num_blocks = RolloutEngine::blocks_for(rollout.max_sequences + 1,
                                                 static_cast<std::int64_t>(longest) + rollout.max_new_tokens);
  std::function<std::string(TokenId)> token_bytes;
  if (model.has_tokenizer())
    token_bytes = [tokenizer = model.tokenizer()](TokenId id) { return tokenizer.token_bytes(id); };
  return std::make_unique<RolloutEngine>(model.config(), compute, options, std::move(token_bytes));
}

std::vector<Sample> generate_all(RolloutEngine& engine, const DecoderWeights<float>& weights,
                                 WeightVersion version, std::vector<GenerationRequest> requests) {
  std::map<PromptId, std::size_t> order;
  for (GenerationRequest& request : requests) {
    order.emplace(request.prompt_id, order.size());
    engine.submit(std::move(request));
  }
  std::vector<Sample> samples;
  while (engine.busy()) {
    engine.step(weights, version);
    while (auto sample = engine.try_take()) samples.push_back(std::move(*sample));
  }
  std::ranges::sort(samples, {},
                    [&](const Sample& s) { return std::pair(order.at(s.prompt_id), s.sample_index); });
  return samples;
}

std::string response_text(const LanguageModel& model, const Sample& sample) {
  return model.tokenizer().decode(sample.tokens, {.skip_special = true});
}

struct PpoTrainer::Response {
  const Prompt* prompt = nullptr;
  Sample sample;
  std::string text;
  Score rule_score;
  double model_score = 0;
  std::vector<TokenId> tokens;  // prompt and response
  ppo::ScoredResponse scored;

  std::int64_t first_row() const { return static_cast<std::int64_t>(prompt->tokens.size()) - 1; }
};

// One rollout batch and everything that is known about it.
struct PpoTrainer::Batch {
  std::vector<Response> responses;
  ppo::Experience experience;
  Metrics metrics;
  std::map<std::string, double> loss_metrics;  // sums over micro-batches
  std::int64_t micro_batches = 0, optimizer_steps = 0, skipped_steps = 0;
  double gradient_norm = 0, critic_gradient_norm = 0;
  std::int64_t resampled_groups = 0;
};

PpoTrainer::PpoTrainer(LanguageModel& policy, const Parameters<float>& reference,
                       const Parameters<float>* reward_model, const Parameters<float>* critic_base,
                       const TaskData& data, const RolloutOptions& rollout, const PpoStageOptions& options,
                       const StageContext& context)
    : policy_(policy),
      reference_(reference),
      reward_model_(reward_model),
      data_(data),
      rollout_(rollout),
      options_(options),
      context_(context),
      policy_optimizer_(options.algorithm.optimizer, policy.parameters().trainable().size()),
      engine_(make_engine(policy, rollout, data.train_prompts, context.compute)),
      pass_(policy.config(), context.compute),
      kl_controller_(options.algorithm.kl.controller, options.algorithm.kl.coefficient) {
  RLHF_CHECK(!data.train_prompts.empty(), "ppo: there are no prompts");
  RLHF_CHECK(options.reward_model_weight == 0 || reward_model, "ppo.reward_model_weight is ",
             options.reward_model_weight,
             " but there is no reward model: add the stage 'reward' before 'ppo'");
  RLHF_CHECK(options.reward_model_weight != 0 || !data.rules.empty(),
             "ppo: there is neither a rule reward nor a "
             "reward model (ppo.reward_model_weight is 0)");
  const ppo::PpoOptions& algorithm = options.algorithm;
  if (ppo::needs_critic(algorithm)) {
    ModelConfig config = policy.config();
    config.scalar_head = true;
    config.num_labels = 1;
    critic_.emplace(config, policy.parameters().trainable_options(),
                    critic_base ? critic_base : &policy.parameters());
    if (!critic_base || !critic_base->config().scalar_head) critic_->initialise_score_head(context.seed);
    critic_optimizer_.emplace(algorithm.critic_update == ppo::CriticUpdate::kSeparate
                                  ? algorithm.critic_optimizer
                                  : algorithm.optimizer,
                              critic_->trainable().size());
  }
  const auto& weights = policy.parameters().weights();
  trunk_layers_ = weights.first_trainable_layer;
  if (critic_) trunk_layers_ = std::min(trunk_layers_, shared_trunk_layers(weights, critic_->weights()));
  if (ppo::needs_reference(algorithm))
    trunk_layers_ = std::min(trunk_layers_, shared_trunk_layers(weights, reference.weights()));
}

bool PpoTrainer::recompute_old_log_probs() const {
  if (options_.old_log_probs != OldLogProbs::kAuto) return options_.old_log_probs == OldLogProbs::kRecompute;
  return !keeps_all(rollout_.sampling) || rollout_.sampling.repetition_penalty != 1 ||
         rollout_.sampling.presence_penalty != 0 || rollout_.sampling.frequency_penalty != 0;
}

void PpoTrainer::run() {
  std::vector<LearningModel> models = {{"policy", &policy_.parameters(), &policy_optimizer_}};
  if (critic_) models.push_back({"value", &*critic_, &*critic_optimizer_});
  StageCheckpoint checkpoint(context_, "ppo", models);
  std::map<std::string, double> numbers = {{"kl_coefficient", kl_controller_.coefficient()}};
  std::int64_t iteration = checkpoint.restore(numbers);
  kl_controller_.restore(numbers["kl_coefficient"]);
  context_.observer->stage_begin("ppo", options_.iterations);

  for (; iteration < options_.iterations; ++iteration) {
    Batch batch;
    Stopwatch watch;
    generate(batch, iteration);
    const double generation_seconds = watch.lap();
    score(batch);
    forward_models(batch);
    const double scoring_seconds = watch.lap();
    estimate_advantages(batch);
    update(batch, iteration);
    const double training_seconds = watch.lap();

    double tokens = 0;
    for (const Response& response : batch.responses)
      tokens += static_cast<double>(response.sample.tokens.size());
    for (const auto& [name, sum] : batch.loss_metrics)
      batch.metrics.emplace_back(name,
                                 sum / static_cast<double>(std::max<std::int64_t>(1, batch.micro_batches)));
    for (const auto& [name, value] : batch.experience.metrics) batch.metrics.emplace_back(name, value);
    batch.metrics.emplace_back("train/gradient_norm",
                               batch.gradient_norm / static_cast<double>(batch.optimizer_steps));
    if (critic_)
      batch.metrics.emplace_back("train/critic_gradient_norm",
                                 batch.critic_gradient_norm / static_cast<double>(batch.optimizer_steps));
    batch.metrics.emplace_back("train/skipped_steps", static_cast<double>(batch.skipped_steps));
    batch.metrics.emplace_back("train/learning_rate", policy_learning_rate_);
    batch.metrics.emplace_back("train/kl_coefficient", kl_controller_.coefficient());
    batch.metrics.emplace_back("time/generate_s", generation_seconds);
    batch.metrics.emplace_back("time/score_s", scoring_seconds);
    batch.metrics.emplace_back("time/train_s", training_seconds);
    batch.metrics.emplace_back("tokens_per_s", tokens / watch.seconds());
    batch.metrics.emplace_back("samples_per_s",
                               static_cast<double>(batch.responses.size()) / watch.seconds());
    log_samples(batch, iteration);
    context_.observer->step("ppo", iteration + 1, options_.iterations, batch.metrics);
    numbers["kl_coefficient"] = kl_controller_.coefficient();
    checkpoint.after_step(iteration + 1, options_.iterations, numbers);
  }
  checkpoint.remove();
}

// Prompts of a batch; further rounds (dynamic sampling) take prompts from a stream of their own.
std::vector<std::size_t> PpoTrainer::prompts_of(std::int64_t iteration, std::int64_t round) const {
  return step_items(data_.train_prompts.size(), options_.algorithm.prompts_per_step, iteration,
                    context_.seed + 0x9e3779b9 * static_cast<std::uint64_t>(round));
}

void PpoTrainer::generate(Batch& batch, std::int64_t iteration) {
  const ppo::PpoOptions& algorithm = options_.algorithm;
  engine_->forget_prefixes();  // the weights have changed
  std::vector<GenerationRequest> requests;
  std::vector<const Prompt*> prompts;
  for (std::size_t item : prompts_of(iteration, 0)) {
    prompts.push_back(&data_.train_prompts[item]);
    requests.push_back(make_request(*prompts.back(), rollout_, policy_, data_));
    requests.back().num_samples = static_cast<std::uint32_t>(algorithm.samples_per_prompt);
    requests.back().seed = context_.seed + static_cast<std::uint64_t>(iteration) + 1;
    // A prompt may occur twice in a batch: the slot keeps their draws apart.
    requests.back().prompt_id = requests.size() - 1;
  }
  auto samples = generate_all(*engine_, policy_.parameters().weights(), iteration, std::move(requests));
  for (Sample& sample : samples) {
    Response response;
    response.prompt = prompts[sample.prompt_id];
    response.scored.group = sample.prompt_id;
    sample.prompt_id = response.prompt->id;
    response.text = policy_.has_tokenizer() ? response_text(policy_, sample) : std::string();
    response.tokens = response.prompt->tokens;
    response.tokens.insert(response.tokens.end(), sample.tokens.begin(), sample.tokens.end());
    response.scored.log_probs.assign(sample.logprobs.begin(), sample.logprobs.end());
    response.scored.rollout_log_probs = response.scored.log_probs;
    response.scored.mask = sample.mask;
    response.scored.ended = sample.finish_reason == FinishReason::kStop;
    response.scored.truncated = sample.finish_reason == FinishReason::kLength;
    response.sample = std::move(sample);
    batch.responses.push_back(std::move(response));
  }
}

void PpoTrainer::score(Batch& batch) {
  std::vector<Score> scores;
  for (Response& response : batch.responses) {
    if (!data_.rules.empty()) {
      response.rule_score = data_.rules.score({*response.prompt, response.sample, response.text});
      scores.push_back(response.rule_score);
    }
    response.scored.score = response.rule_score.total;
  }
  if (options_.reward_model_weight != 0) {
    std::vector<std::span<const TokenId>> sequences;
    for (const Response& response : batch.responses) sequences.push_back(response.tokens);
    pass_.drop_trunk();
    const auto model_scores =
        score_sequences(pass_, reward_model_->weights(), sequences, options_.max_tokens_per_micro_batch);
    double mean = 0;
    for (std::size_t i = 0; i < batch.responses.size(); ++i) {
      batch.responses[i].model_score = model_scores[i];
      batch.responses[i].scored.score += options_.reward_model_weight * model_scores[i];
      mean += model_scores[i] / static_cast<double>(model_scores.size());
    }
    batch.metrics.emplace_back("reward/model", mean);
  }
  double total = 0, length = 0, ended = 0, rule = 0;
  for (const Response& response : batch.responses) {
    total += response.scored.score;
    rule += response.rule_score.total;
    length += static_cast<double>(response.sample.tokens.size());
    ended += response.scored.ended;
  }
  const double n = static_cast<double>(batch.responses.size());
  batch.metrics.emplace_back("reward/total", total / n);
  batch.metrics.emplace_back("reward/rules", rule / n);
  for (const TermStatistics& term : data_.rules.summarise(scores)) {
    batch.metrics.emplace_back("reward/" + term.name, term.mean);
    batch.metrics.emplace_back("reward/" + term.name + "_stddev", term.stddev);
  }
  batch.metrics.emplace_back("rollout/mean_length", length / n);
  batch.metrics.emplace_back("rollout/eos_rate", ended / n);
}

// Log-probs of the reference (and of the policy, when the sampler's are not used) and values, one pass over
// the batch. Models that share a trunk run it once.
void PpoTrainer::forward_models(Batch& batch) {
  const ppo::PpoOptions& algorithm = options_.algorithm;
  const bool reference = ppo::needs_reference(algorithm), recompute = recompute_old_log_probs();
  if (!reference && !recompute && !critic_) return;
  std::vector<std::int64_t> lengths;
  for (const Response& response : batch.responses)
    lengths.push_back(static_cast<std::int64_t>(response.tokens.size()));
  double gap = 0, gap_max = 0, gap_count = 0;
  for (const auto& micro : split_by_tokens(lengths, options_.max_tokens_per_micro_batch)) {
    std::vector<std::span<const TokenId>> sequences;
    for (std::size_t i : micro) sequences.push_back(batch.responses[i].tokens);
    const PackedRows rows(sequences);
    std::vector<TokenTarget> targets;
    std::vector<std::int64_t> value_rows;
    for (std::size_t s = 0; s < micro.size(); ++s) {
      const Response& response = batch.responses[micro[s]];
      const std::int64_t first = rows.offsets()[s] + response.first_row();
      const auto n = static_cast<std::int64_t>(response.sample.tokens.size());
      for (std::int64_t t = 0; t < n; ++t) {
        targets.push_back({first + t, response.sample.tokens[static_cast<std::size_t>(t)]});
        value_rows.push_back(first + t);
      }
      const bool has_next = n < rollout_.max_new_tokens;
      if (algorithm.value_positions == ppo::ValuePositions::kTokensAndNext && has_next)
        value_rows.push_back(first + n);
    }
    pass_.drop_trunk();
    if (trunk_layers_ > 0) pass_.run_trunk(policy_.parameters().weights(), rows, trunk_layers_);
    std::vector<float> logprobs(targets.size());
    const auto scatter = [&](std::vector<double> ppo::ScoredResponse::*field,
                             const std::vector<float>& flat) {
      std::size_t next = 0;
      for (std::size_t i : micro) {
        const std::size_t n = batch.responses[i].sample.tokens.size();
        (batch.responses[i].scored.*field)
            .assign(flat.begin() + static_cast<std::ptrdiff_t>(next),
                    flat.begin() + static_cast<std::ptrdiff_t>(next + n));
        next += n;
      }
    };
    if (recompute) {
      pass_.forward(policy_.parameters().weights(), rows, Pass::Keep::kNothing);
      pass_.token_logprobs(policy_.parameters().weights(), targets, rollout_.sampling.temperature, logprobs,
                           {});
      scatter(&ppo::ScoredResponse::log_probs, logprobs);
      for (std::size_t i : micro)
        for (std::size_t t = 0; t < batch.responses[i].sample.tokens.size(); ++t) {
          if (!batch.responses[i].sample.mask[t]) continue;
          const double difference = std::abs(batch.responses[i].scored.log_probs[t] -
                                             batch.responses[i].scored.rollout_log_probs[t]);
          gap += difference;
          gap_max = std::max(gap_max, difference);
          ++gap_count;
        }
    }
    if (reference) {
      pass_.forward(reference_.weights(), rows, Pass::Keep::kNothing);
      pass_.token_logprobs(reference_.weights(), targets, rollout_.sampling.temperature, logprobs, {});
      scatter(&ppo::ScoredResponse::reference_log_probs, logprobs);
    }
    if (critic_) {
      std::vector<float> values(value_rows.size());
      pass_.forward(critic_->weights(), rows, Pass::Keep::kNothing);
      pass_.scalar_outputs(critic_->weights(), value_rows, values);
      std::size_t next = 0;
      for (std::size_t i : micro) {
        Response& response = batch.responses[i];
        std::size_t n = response.sample.tokens.size();
        n += algorithm.value_positions == ppo::ValuePositions::kTokensAndNext &&
             static_cast<std::int64_t>(n) < rollout_.max_new_tokens;
        response.scored.values.assign(values.begin() + static_cast<std::ptrdiff_t>(next),
                                      values.begin() + static_cast<std::ptrdiff_t>(next + n));
        next += n;
      }
    }
  }
  if (recompute && gap_count > 0) {
    batch.metrics.emplace_back("rollout/logprob_gap_mean", gap / gap_count);
    batch.metrics.emplace_back("rollout/logprob_gap_max", gap_max);
  }
}

void PpoTrainer::estimate_advantages(Batch& batch) {
  std::vector<ppo::ScoredResponse> scored;
  for (const Response& response : batch.responses) scored.push_back(response.scored);
  batch.experience = ppo::compute_experience(options_.algorithm, kl_controller_.coefficient(), scored);
  kl_controller_.update(batch.experience.mean_kl, scored.size());
}

double PpoTrainer::learning_rate(const OptimizerOptions& options, std::int64_t iteration) const {
  // One schedule step per rollout batch, as TRL's PPO.
  return options.learning_rate * learning_rate_factor(options.schedule, static_cast<std::size_t>(iteration),
                                                      static_cast<std::size_t>(options_.iterations));
}

void PpoTrainer::update(Batch& batch, std::int64_t iteration) {
  const ppo::PpoOptions& algorithm = options_.algorithm;
  policy_learning_rate_ = learning_rate(policy_optimizer_.options(), iteration);
  if (critic_) critic_learning_rate_ = learning_rate(critic_optimizer_->options(), iteration);
  const std::size_t n = batch.responses.size();
  for (std::size_t epoch = 0; epoch < algorithm.epochs; ++epoch) {
    const auto order = epoch_order(n, context_.seed ^ 0x0bad5eed,
                                   static_cast<std::uint64_t>(iteration) * algorithm.epochs + epoch);
    const std::size_t steps = std::min(algorithm.mini_batches, n);
    for (std::size_t m = 0; m < steps; ++m) {
      const std::vector<std::size_t> chosen(order.begin() + static_cast<std::ptrdiff_t>(m * n / steps),
                                            order.begin() + static_cast<std::ptrdiff_t>((m + 1) * n / steps));
      train_mini_batch(batch, chosen);
    }
  }
}

namespace {

// Offsets of some rows of a flat array, and gathering of their values.
struct RowSelection {
  std::vector<std::size_t> offsets{0};
  std::vector<std::size_t> positions;

  RowSelection(const std::vector<std::size_t>& all_offsets, const std::vector<std::size_t>& rows) {
    for (std::size_t row : rows) {
      for (std::size_t p = all_offsets[row]; p < all_offsets[row + 1]; ++p) positions.push_back(p);
      offsets.push_back(positions.size());
    }
  }
  template <class T>
  std::vector<T> gather(const std::vector<T>& all) const {
    std::vector<T> values;
    if (all.empty()) return values;
    values.reserve(positions.size());
    for (std::size_t p : positions) values.push_back(all[p]);
    return values;
  }
};

ppo::AggregationContext totals(const RowSelection& selection, const std::vector<std::uint8_t>& mask) {
  const ppo::TokenRows rows{selection.offsets, mask};
  ppo::AggregationContext context;
  context.total_tokens = static_cast<double>(ppo::count_tokens(rows));
  context.total_sequences = static_cast<double>(ppo::count_active_rows(rows));
  return context;
}

}  // namespace

void PpoTrainer::train_mini_batch(Batch& batch, const std::vector<std::size_t>& responses) {
  const ppo::Experience& experience = batch.experience;
  const RowSelection tokens(experience.offsets, responses);
  const auto policy_context = totals(tokens, tokens.gather(experience.mask));
  ppo::AggregationContext value_context;
  if (critic_) {
    const RowSelection values(experience.value_offsets, responses);
    value_context = totals(values, values.gather(experience.value_mask));
  }
  std::vector<std::int64_t> lengths;
  for (std::size_t i : responses)
    lengths.push_back(static_cast<std::int64_t>(batch.responses[i].tokens.size()));
  for (const auto& micro : split_by_tokens(lengths, options_.max_tokens_per_micro_batch)) {
    std::vector<std::size_t> chosen;
    for (std::size_t i : micro) chosen.push_back(responses[i]);
    train_micro_batch(batch, chosen, policy_context, value_context);
  }
  const auto update = policy_optimizer_.step(context_.compute, policy_.parameters(), policy_learning_rate_);
  batch.gradient_norm += update.skipped ? 0 : update.gradient_norm;
  batch.skipped_steps += update.skipped;
  if (critic_) {
    const auto critic_update = critic_optimizer_->step(context_.compute, *critic_, critic_learning_rate_);
    batch.critic_gradient_norm += critic_update.skipped ? 0 : critic_update.gradient_norm;
    batch.skipped_steps += critic_update.skipped;
  }
  ++batch.optimizer_steps;
}

void PpoTrainer::train_micro_batch(Batch& batch, const std::vector<std::size_t>& responses,
                                   const ppo::AggregationContext& policy_context,
                                   const ppo::AggregationContext& value_context) {
  const ppo::PpoOptions& algorithm = options_.algorithm;
  const ppo::Experience& experience = batch.experience;
  const RowSelection tokens(experience.offsets, responses);
  std::vector<std::span<const TokenId>> sequences;
  for (std::size_t i : responses) sequences.push_back(batch.responses[i].tokens);
  const PackedRows rows(sequences);
  std::vector<TokenTarget> targets;
  for (std::size_t s = 0; s < responses.size(); ++s) {
    const Response& response = batch.responses[responses[s]];
    for (std::size_t t = 0; t < response.sample.tokens.size(); ++t)
      targets.push_back({rows.offsets()[s] + response.first_row() + static_cast<std::int64_t>(t),
                         response.sample.tokens[t]});
  }
  pass_.drop_trunk();
  if (trunk_layers_ > 0) pass_.run_trunk(policy_.parameters().weights(), rows, trunk_layers_);

  const auto& weights = policy_.parameters().weights();
  std::vector<float> logprobs(targets.size()), entropies(targets.size());
  pass_.forward(weights, rows, Pass::Keep::kForBackward);
  pass_.token_logprobs(weights, targets, rollout_.sampling.temperature, logprobs, entropies);
  const std::vector<double> new_log_probs(logprobs.begin(), logprobs.end()),
      entropy(entropies.begin(), entropies.end());
  const auto mask = tokens.gather(experience.mask);
  const auto old_log_probs = tokens.gather(experience.old_log_probs),
             advantages = tokens.gather(experience.advantages);
  const auto reference = tokens.gather(experience.reference_log_probs);
  const auto importance = tokens.gather(experience.importance_weights);
  ppo::PolicyLossInputs inputs;
  inputs.rows = {tokens.offsets, mask};
  inputs.log_probs = new_log_probs;
  inputs.old_log_probs = old_log_probs;
  inputs.advantages = advantages;
  inputs.reference_log_probs = reference;
  inputs.entropies = entropy;
  inputs.importance_weights = importance;
  inputs.context = policy_context;
  inputs.seed = context_.seed;
  const ppo::PolicyLossResult loss = ppo::policy_loss(algorithm.policy, inputs);
  if (!std::isfinite(loss.loss)) {
    std::string ids;
    for (std::size_t i : responses) ids += concat(ids.empty() ? "" : ", ", batch.responses[i].prompt->id);
    fail<Error>("ppo: the policy loss is ", loss.loss, " in a micro-batch of prompts ", ids);
  }
  const std::vector<float> dlogprobs(loss.d_log_probs.begin(), loss.d_log_probs.end());
  const std::vector<float> dentropies(loss.d_entropies.begin(), loss.d_entropies.end());
  pass_.token_logprobs_backward(weights, targets, rollout_.sampling.temperature, dlogprobs, dentropies);
  pass_.backward(weights, rows);
  batch.loss_metrics["loss/policy"] += loss.policy_loss;
  batch.loss_metrics["policy/clip_fraction"] += loss.metrics.clip_fraction;
  batch.loss_metrics["policy/approx_kl"] += loss.metrics.approx_kl_k2;
  batch.loss_metrics["policy/ratio_mean"] += loss.metrics.ratio_mean;
  batch.loss_metrics["policy/ratio_variance"] += loss.metrics.ratio_variance;
  batch.loss_metrics["policy/entropy"] += std::accumulate(entropy.begin(), entropy.end(), 0.0) /
                                          static_cast<double>(std::max<std::size_t>(1, entropy.size()));
  if (algorithm.policy.kl.coefficient > 0) batch.loss_metrics["loss/kl"] += loss.kl_loss;
  ++batch.micro_batches;
  if (!critic_) return;

  const RowSelection value_rows(experience.value_offsets, responses);
  std::vector<std::int64_t> rows_of_values;
  for (std::size_t s = 0; s < responses.size(); ++s) {
    const std::int64_t first = rows.offsets()[s] + batch.responses[responses[s]].first_row();
    const std::size_t n = value_rows.offsets[s + 1] - value_rows.offsets[s];
    for (std::size_t t = 0; t < n; ++t) rows_of_values.push_back(first + static_cast<std::int64_t>(t));
  }
  std::vector<float> values(rows_of_values.size());
  pass_.forward(critic_->weights(), rows, Pass::Keep::kForBackward);
  pass_.scalar_outputs(critic_->weights(), rows_of_values, values);
  const std::vector<double> new_values(values.begin(), values.end());
  const auto value_mask = value_rows.gather(experience.value_mask);
  const auto old_values = value_rows.gather(experience.old_values),
             returns = value_rows.gather(experience.returns);
  const ppo::ValueLossResult value_loss = ppo::value_loss(
      algorithm.value, {{value_rows.offsets, value_mask}, new_values, old_values, returns, value_context});
  if (!std::isfinite(value_loss.loss)) fail<Error>("ppo: the value loss is ", value_loss.loss);
  const std::vector<float> dvalues(value_loss.d_values.begin(), value_loss.d_values.end());
  pass_.scalar_outputs_backward(critic_->weights(), rows_of_values, dvalues);
  pass_.backward(critic_->weights(), rows);
  batch.loss_metrics["loss/value"] += value_loss.loss;
  batch.loss_metrics["value/clip_fraction"] += value_loss.clip_fraction;
  batch.loss_metrics["value/explained_variance"] += value_loss.explained_variance;
}

void PpoTrainer::log_samples(const Batch& batch, std::int64_t iteration) {
  const auto count = std::min(static_cast<std::size_t>(options_.samples_to_log), batch.responses.size());
  for (std::size_t i = 0; i < count; ++i) {
    const Response& response = batch.responses[i];
    nlohmann::json line = {
        {"iteration", iteration + 1},    {"prompt_id", response.prompt->id},
        {"task", response.prompt->task}, {"prompt", response.prompt->text},
        {"response", response.text},     {"finish_reason", to_string(response.sample.finish_reason)},
        {"score", response.scored.score}};
    for (std::size_t t = 0; t < response.rule_score.terms.size(); ++t)
      line["terms"][data_.rules.names()[t]] = response.rule_score.terms[t];
    if (options_.reward_model_weight != 0) line["reward_model"] = response.model_score;
    context_.observer->sample("ppo", line.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace));
  }
}

}  // namespace rlhf

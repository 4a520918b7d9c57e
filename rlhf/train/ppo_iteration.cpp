#include "rlhf/train/ppo_iteration.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "rlhf/core/error.h"
#include "rlhf/ppo/policy_loss.h"
#include "rlhf/ppo/value_loss.h"
#include "rlhf/train/batching.h"

namespace rlhf {
namespace {

using Keep = SequencePass<float>::Keep;

std::ptrdiff_t at(std::size_t index) {
  return static_cast<std::ptrdiff_t>(index);
}

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
  std::size_t length(std::size_t row) const { return offsets[row + 1] - offsets[row]; }
};

ppo::AggregationContext totals(const RowSelection& selection, const std::vector<std::uint8_t>& mask) {
  const ppo::TokenRows rows{selection.offsets, mask};
  ppo::AggregationContext context;
  context.total_tokens = static_cast<double>(ppo::count_tokens(rows));
  context.total_sequences = static_cast<double>(ppo::count_active_rows(rows));
  return context;
}

std::vector<double> widen(const std::vector<float>& values) {
  return {values.begin(), values.end()};
}
std::vector<float> narrow(const std::vector<double>& values) {
  return {values.begin(), values.end()};
}

}  // namespace

// The rows of some responses, and which of them predict response tokens. The trunk has been run.
struct PpoIteration::Pass {
  PackedRows rows;
  std::vector<TokenTarget> targets;  // every response token, response by response

  Pass(const std::vector<PpoResponse>& all, const Indices& samples)
      : rows([&] {
          std::vector<std::span<const TokenId>> sequences;
          for (std::size_t i : samples) sequences.push_back(all[i].tokens);
          return sequences;
        }()) {
    for (std::size_t s = 0; s < samples.size(); ++s) {
      const PpoResponse& response = all[samples[s]];
      for (std::size_t t = 0; t < response.sample.tokens.size(); ++t)
        targets.push_back({rows.row(s, response.predictor(t)), response.sample.tokens[t]});
    }
  }
};

PpoIteration::PpoIteration(const PpoSetting& setting, PpoModels& models, ppo::KlController& kl,
                           std::int64_t iteration)
    : setting_(setting),
      algorithm_(setting.options.algorithm),
      models_(models),
      kl_(kl),
      iteration_(iteration),
      before_(models.engine->statistics()),
      slots_(algorithm_.prompts_per_step),
      responses_(algorithm_.prompts_per_step * algorithm_.samples_per_prompt) {
  models_.engine->forget_prefixes();  // the weights have changed
  for (std::size_t slot = 0; slot < slots_.size(); ++slot) submit(slot, 0);
}

// ---- generate ----

void PpoIteration::submit(std::size_t slot, std::int64_t round) {
  // Further rounds (dynamic sampling) take prompts from a shuffled stream of their own.
  const auto items = step_items(setting_.data.train_prompts.size(), slots_.size(), iteration_,
                                setting_.context.seed + 0x9e3779b9 * static_cast<std::uint64_t>(round),
                                round == 0 ? setting_.options.prompt_order : ItemOrder::kShuffled);
  slots_[slot] = {&setting_.data.train_prompts[items[slot]], round, 0};
  GenerationRequest request =
      make_request(*slots_[slot].prompt, setting_.rollout, models_.policy, setting_.data);
  request.num_samples = static_cast<std::uint32_t>(algorithm_.samples_per_prompt);
  request.seed = setting_.context.seed + static_cast<std::uint64_t>(iteration_) + 1;
  // A prompt may occur twice in a batch: the slot keeps their draws apart.
  request.prompt_id = slot + static_cast<std::uint64_t>(round) * slots_.size();
  if (setting_.adjust_request)
    setting_.adjust_request(request, static_cast<std::uint64_t>(iteration_) * slots_.size() + slot);
  models_.engine->submit(std::move(request));
}

std::vector<schedule::SampleIndex> PpoIteration::generate() {
  Indices finished;
  while (finished.empty()) {
    models_.engine->step(models_.policy.parameters().weights(), iteration_);
    while (auto sample = models_.engine->try_take()) {
      const std::size_t slot = sample->prompt_id % slots_.size();
      accept(std::move(*sample));
      const std::size_t per_slot = algorithm_.samples_per_prompt;
      if (++slots_[slot].finished < per_slot || sample_again(slot)) continue;
      for (std::size_t k = 0; k < per_slot; ++k) finished.push_back(slot * per_slot + k);
    }
  }
  return finished;
}

void PpoIteration::accept(Sample sample) {
  const std::size_t slot = sample.prompt_id % slots_.size();
  PpoResponse response;
  response.prompt = slots_[slot].prompt;
  response.scored.group = slot;
  sample.prompt_id = response.prompt->id;
  if (models_.policy.has_tokenizer()) response.text = response_text(models_.policy, sample);
  response.tokens = response.prompt->tokens;
  response.tokens.insert(response.tokens.end(), sample.tokens.begin(), sample.tokens.end());
  response.scored.rollout_log_probs = widen(sample.logprobs);
  response.scored.log_probs = response.scored.rollout_log_probs;
  response.scored.mask = sample.mask;
  response.scored.ended = sample.finish_reason == FinishReason::kStop;
  response.scored.truncated = sample.finish_reason == FinishReason::kLength;
  response.sample = std::move(sample);
  score_by_rules(response);
  const std::size_t index = slot * algorithm_.samples_per_prompt + response.sample.sample_index;
  responses_[index] = std::move(response);
}

// DAPO: a group whose responses all have the same reward teaches nothing; another prompt takes its place.
bool PpoIteration::sample_again(std::size_t slot) {
  const auto& dynamic = algorithm_.dynamic_sampling;
  if (!dynamic.enabled || slots_[slot].round >= static_cast<std::int64_t>(dynamic.max_rounds)) return false;
  const std::size_t first = slot * algorithm_.samples_per_prompt;
  for (std::size_t k = 1; k < algorithm_.samples_per_prompt; ++k)
    if (responses_[first + k].rule_score.total != responses_[first].rule_score.total) return false;
  ++resampled_groups_;
  submit(slot, slots_[slot].round + 1);
  return true;
}

// ---- score ----

void PpoIteration::score_by_rules(PpoResponse& response) {
  if (setting_.data.rules.empty()) return;
  response.rule_score = setting_.data.rules.score({*response.prompt, response.sample, response.text});
  response.scored.score = response.rule_score.total;
}

bool PpoIteration::recompute_old_log_probs() const {
  const OldLogProbs choice = setting_.options.old_log_probs;
  if (choice != OldLogProbs::kAuto) return choice == OldLogProbs::kRecompute;
  const SamplingOptions& sampling = setting_.rollout.sampling;
  return !keeps_all(sampling) || sampling.repetition_penalty != 1 || sampling.presence_penalty != 0 ||
         sampling.frequency_penalty != 0;
}

bool PpoIteration::has_next_value(const PpoResponse& response) const {
  return algorithm_.value_positions == ppo::ValuePositions::kTokensAndNext &&
         static_cast<std::int64_t>(response.sample.tokens.size()) < setting_.rollout.max_new_tokens;
}

void PpoIteration::score(std::span<const schedule::SampleIndex> samples) {
  if (!models_.reference && !models_.reward && !models_.critic && !recompute_old_log_probs()) return;
  std::vector<std::span<const TokenId>> sequences;
  for (std::size_t i : samples) sequences.push_back(responses_[i].tokens);
  for (const Indices& part : split_into_passes(sequences, setting_.options.max_tokens_per_micro_batch)) {
    Indices chosen;
    for (std::size_t i : part) chosen.push_back(samples[i]);
    score_by_models(chosen);
  }
}

// The layers that no model of the stage trains, once for all of them, and once an iteration while there is
// room.
void PpoIteration::run_trunk(const Indices& samples, const Pass& pass) {
  models_.pass.drop_trunk();
  if (models_.trunk_layers == 0) return;
  const auto D = static_cast<std::size_t>(models_.policy.config().hidden_size);
  const auto for_tokens = [&](const auto& visit) {
    for (std::size_t s = 0; s < samples.size(); ++s)
      for (std::size_t p = 0; p < responses_[samples[s]].tokens.size(); ++p)
        visit(responses_[samples[s]], p,
              static_cast<std::size_t>(pass.rows.row(s, static_cast<std::int64_t>(p))));
  };
  if (std::ranges::none_of(samples, [&](std::size_t i) { return responses_[i].trunk.empty(); })) {
    std::vector<const float*> rows(static_cast<std::size_t>(pass.rows.rows().size()));
    for_tokens([&](PpoResponse& r, std::size_t p, std::size_t row) { rows[row] = r.trunk.data() + p * D; });
    return models_.pass.restore_trunk(rows, models_.trunk_layers);
  }
  models_.pass.run_trunk(models_.policy.parameters().weights(), pass.rows, models_.trunk_layers);
  std::size_t bytes = 0;
  for (std::size_t i : samples) bytes += responses_[i].tokens.size() * D * sizeof(float);
  if (trunk_bytes_ + bytes > models_.trunk_cache_bytes) return;
  trunk_bytes_ += bytes;
  for (std::size_t i : samples) responses_[i].trunk.resize(responses_[i].tokens.size() * D);
  for_tokens([&](PpoResponse& r, std::size_t p, std::size_t row) {
    std::copy_n(models_.pass.trunk() + row * D, D, r.trunk.data() + p * D);
  });
}

// One pass over some responses: models that share a trunk run it once.
void PpoIteration::score_by_models(const Indices& samples) {
  const Pass pass(responses_, samples);
  SequencePass<float>& runner = models_.pass;
  const auto& policy = models_.policy.parameters().weights();
  run_trunk(samples, pass);
  const auto log_probs = [&](const DecoderWeights<float>& weights,
                             std::vector<double> ppo::ScoredResponse::*field) {
    std::vector<float> flat(pass.targets.size());
    runner.forward(weights, pass.rows, Keep::kNothing);
    runner.token_logprobs(weights, pass.targets, setting_.rollout.sampling.temperature, flat, {});
    std::size_t next = 0;
    for (std::size_t i : samples) {
      const std::size_t n = responses_[i].sample.tokens.size();
      (responses_[i].scored.*field).assign(flat.begin() + at(next), flat.begin() + at(next + n));
      next += n;
    }
  };
  const auto scalars = [&](const DecoderWeights<float>& weights, const std::vector<std::int64_t>& rows) {
    std::vector<float> values(rows.size());
    runner.forward(weights, pass.rows, Keep::kNothing);
    runner.scalar_outputs(weights, rows, values);
    return values;
  };
  if (recompute_old_log_probs()) {
    log_probs(policy, &ppo::ScoredResponse::log_probs);
    for (std::size_t i : samples)
      for (std::size_t t = 0; t < responses_[i].sample.tokens.size(); ++t) {
        if (!responses_[i].sample.mask[t]) continue;
        const ppo::ScoredResponse& scored = responses_[i].scored;
        const double gap = std::abs(scored.log_probs[t] - scored.rollout_log_probs[t]);
        gap_sum_ += gap;
        gap_max_ = std::max(gap_max_, gap);
        ++gap_count_;
      }
  }
  if (models_.reference) log_probs(models_.reference->weights(), &ppo::ScoredResponse::reference_log_probs);
  if (models_.reward) {
    std::vector<std::int64_t> last;
    for (std::size_t s = 0; s < samples.size(); ++s) last.push_back(pass.rows.last_row(s));
    const auto scores = scalars(models_.reward->weights(), last);
    for (std::size_t s = 0; s < samples.size(); ++s) {
      PpoResponse& response = responses_[samples[s]];
      response.model_score = static_cast<double>(scores[s]);
      response.scored.score += setting_.options.reward_model_weight * response.model_score;
    }
  }
  if (models_.critic) {
    std::vector<std::int64_t> rows;
    for (std::size_t s = 0; s < samples.size(); ++s) {
      const PpoResponse& response = responses_[samples[s]];
      const std::size_t n = response.sample.tokens.size() + has_next_value(response);
      for (std::size_t t = 0; t < n; ++t) rows.push_back(pass.rows.row(s, response.predictor(t)));
    }
    const auto values = scalars(models_.critic->weights(), rows);
    std::size_t next = 0;
    for (std::size_t i : samples) {
      const std::size_t n = responses_[i].sample.tokens.size() + has_next_value(responses_[i]);
      responses_[i].scored.values.assign(values.begin() + at(next), values.begin() + at(next + n));
      next += n;
    }
  }
}

// ---- advantages ----

void PpoIteration::compute_advantages() {
  std::vector<ppo::ScoredResponse> scored;
  for (const PpoResponse& response : responses_) scored.push_back(response.scored);
  experience_ = ppo::compute_experience(algorithm_, kl_.coefficient(), scored);
  kl_.update(experience_.mean_kl, scored.size());
  plan_updates();
}

std::size_t PpoIteration::num_optimizer_steps() const {
  return algorithm_.epochs * std::min(algorithm_.mini_batches, responses_.size());
}

std::size_t PpoIteration::num_micro_batches(std::size_t step) const {
  return updates_.at(step).micro_batches.size();
}

void PpoIteration::plan_updates() {
  const std::size_t n = responses_.size(), parts = std::min(algorithm_.mini_batches, n);
  for (std::size_t step = 0; step < num_optimizer_steps(); ++step) {
    const std::size_t epoch = step / parts, m = step % parts;
    const auto order = epoch_order(n, setting_.context.seed ^ 0x0bad5eed,
                                   static_cast<std::uint64_t>(iteration_) * algorithm_.epochs + epoch);
    const Indices chosen(order.begin() + at(m * n / parts), order.begin() + at((m + 1) * n / parts));
    Update update;
    const RowSelection tokens(experience_.offsets, chosen);
    update.policy = totals(tokens, tokens.gather(experience_.mask));
    if (models_.critic) {
      const RowSelection values(experience_.value_offsets, chosen);
      update.value = totals(values, values.gather(experience_.value_mask));
    }
    std::vector<std::span<const TokenId>> sequences;
    for (std::size_t i : chosen) sequences.push_back(responses_[i].tokens);
    for (const Indices& part : split_into_passes(sequences, setting_.options.max_tokens_per_micro_batch)) {
      update.micro_batches.emplace_back();
      for (std::size_t i : part) update.micro_batches.back().push_back(chosen[i]);
    }
    updates_.push_back(std::move(update));
  }
}

// ---- train ----

void PpoIteration::train(std::size_t step, std::size_t micro_batch) {
  const Indices& samples = updates_.at(step).micro_batches.at(micro_batch);
  const Pass pass(responses_, samples);
  run_trunk(samples, pass);
  train_policy(samples, pass, step);
  if (models_.critic) train_critic(samples, pass, step);
  ++num_trained_;
}

void PpoIteration::train_policy(const Indices& samples, const Pass& pass, std::size_t step) {
  const auto& weights = models_.policy.parameters().weights();
  const double temperature = setting_.rollout.sampling.temperature;
  std::vector<float> logprobs(pass.targets.size()), entropies(pass.targets.size());
  models_.pass.forward(weights, pass.rows, Keep::kForBackward);
  models_.pass.token_logprobs(weights, pass.targets, temperature, logprobs, entropies);

  const RowSelection tokens(experience_.offsets, samples);
  const auto log_probs = widen(logprobs), entropy = widen(entropies);
  const auto mask = tokens.gather(experience_.mask);
  const auto old_log_probs = tokens.gather(experience_.old_log_probs);
  const auto advantages = tokens.gather(experience_.advantages);
  const auto reference = tokens.gather(experience_.reference_log_probs);
  const auto importance = tokens.gather(experience_.importance_weights);
  ppo::PolicyLossInputs inputs;
  inputs.rows = {tokens.offsets, mask};
  inputs.log_probs = log_probs;
  inputs.old_log_probs = old_log_probs;
  inputs.advantages = advantages;
  inputs.reference_log_probs = reference;
  inputs.entropies = entropy;
  inputs.importance_weights = importance;
  inputs.context = updates_[step].policy;
  inputs.seed = setting_.context.seed;
  const ppo::PolicyLossResult loss = ppo::policy_loss(algorithm_.policy, inputs);
  if (!std::isfinite(loss.loss))
    fail<Error>("ppo: the policy loss of iteration ", iteration_ + 1, " is ", loss.loss,
                " in a micro-batch of prompts ", prompt_ids(samples));
  models_.pass.token_logprobs_backward(weights, pass.targets, temperature, narrow(loss.d_log_probs),
                                       narrow(loss.d_entropies));
  models_.pass.backward(weights, pass.rows);

  loss_sums_["loss/policy"] += loss.policy_loss;
  loss_sums_["policy/clip_fraction"] += loss.metrics.clip_fraction;
  loss_sums_["policy/approx_kl"] += loss.metrics.approx_kl_k2;
  loss_sums_["policy/ratio_mean"] += loss.metrics.ratio_mean;
  loss_sums_["policy/ratio_variance"] += loss.metrics.ratio_variance;
  loss_sums_["policy/entropy"] += std::accumulate(entropy.begin(), entropy.end(), 0.0) /
                                  static_cast<double>(std::max<std::size_t>(1, entropy.size()));
  if (algorithm_.policy.kl.coefficient > 0) loss_sums_["loss/kl"] += loss.kl_loss;
}

void PpoIteration::train_critic(const Indices& samples, const Pass& pass, std::size_t step) {
  const auto& weights = models_.critic->weights();
  const RowSelection selection(experience_.value_offsets, samples);
  std::vector<std::int64_t> rows;
  for (std::size_t s = 0; s < samples.size(); ++s)
    for (std::size_t t = 0; t < selection.length(s); ++t)
      rows.push_back(pass.rows.row(s, responses_[samples[s]].predictor(t)));
  std::vector<float> outputs(rows.size());
  models_.pass.forward(weights, pass.rows, Keep::kForBackward);
  models_.pass.scalar_outputs(weights, rows, outputs);

  const auto values = widen(outputs);
  const auto mask = selection.gather(experience_.value_mask);
  const auto old_values = selection.gather(experience_.old_values);
  const auto returns = selection.gather(experience_.returns);
  const ppo::ValueLossResult loss = ppo::value_loss(
      algorithm_.value, {{selection.offsets, mask}, values, old_values, returns, updates_[step].value});
  if (!std::isfinite(loss.loss))
    fail<Error>("ppo: the value loss of iteration ", iteration_ + 1, " is ", loss.loss,
                " in a micro-batch of prompts ", prompt_ids(samples));
  models_.pass.scalar_outputs_backward(weights, rows, narrow(loss.d_values));
  models_.pass.backward(weights, pass.rows);

  loss_sums_["loss/value"] += loss.loss;
  loss_sums_["value/clip_fraction"] += loss.clip_fraction;
  loss_sums_["value/explained_variance"] += loss.explained_variance;
}

std::string PpoIteration::prompt_ids(const Indices& samples) const {
  std::string ids;
  for (std::size_t i : samples) ids += concat(ids.empty() ? "" : ", ", responses_[i].prompt->id);
  return ids;
}

// ---- optimize ----

double PpoIteration::learning_rate(const ppo::OptimizerOptions& options) const {
  // One schedule step per rollout batch, as TRL's PPO.
  return options.learning_rate * learning_rate_factor(options.schedule, static_cast<std::size_t>(iteration_),
                                                      static_cast<std::size_t>(setting_.options.iterations));
}

void PpoIteration::optimize(std::size_t) {
  const Compute<float>& compute = setting_.context.compute;
  const auto step = [&](Optimizer<float>& optimizer, Parameters<float>& parameters, double& norms) {
    const auto result = optimizer.step(compute, parameters, learning_rate(optimizer.options()));
    if (result.skipped)
      ++skipped_steps_;
    else
      norms += result.gradient_norm;
  };
  step(models_.policy_optimizer, models_.policy.parameters(), gradient_norms_);
  if (models_.critic) step(*models_.critic_optimizer, *models_.critic, critic_gradient_norms_);
  ++num_optimized_;
}

// ---- metrics ----

Metrics PpoIteration::metrics() const {
  const double n = static_cast<double>(responses_.size());
  double total = 0, rules = 0, model = 0, length = 0, ended = 0;
  std::vector<Score> scores;
  for (const PpoResponse& response : responses_) {
    total += response.scored.score / n;
    rules += response.rule_score.total / n;
    model += response.model_score / n;
    length += static_cast<double>(response.sample.tokens.size()) / n;
    ended += response.scored.ended / n;
    if (!setting_.data.rules.empty()) scores.push_back(response.rule_score);
  }
  Metrics out = {{"reward/total", total}, {"reward/rules", rules}};
  if (models_.reward) out.emplace_back("reward/model", model);
  for (const TermStatistics& term : setting_.data.rules.summarise(scores)) {
    out.emplace_back("reward/" + term.name, term.mean);
    out.emplace_back("reward/" + term.name + "_stddev", term.stddev);
  }
  std::map<std::string, std::pair<double, double>> tasks;  // sum of rule scores, count
  for (const PpoResponse& response : responses_) {
    auto& [sum, count] = tasks[response.prompt->task];
    sum += response.rule_score.total;
    ++count;
  }
  if (tasks.size() > 1)
    for (const auto& [task, sums] : tasks) out.emplace_back("reward/task/" + task, sums.first / sums.second);
  out.emplace_back("rollout/mean_length", length);
  out.emplace_back("rollout/eos_rate", ended);
  if (algorithm_.dynamic_sampling.enabled) out.emplace_back("rollout/resampled_groups", resampled_groups_);
  if (gap_count_ > 0) {
    out.emplace_back("rollout/logprob_gap_mean", gap_sum_ / gap_count_);
    out.emplace_back("rollout/logprob_gap_max", gap_max_);
  }
  const GenerationStatistics& after = models_.engine->statistics();
  const double decode_seconds = after.decode_only_seconds - before_.decode_only_seconds;
  if (decode_seconds > 0)
    out.emplace_back(
        "rollout/decode_tokens_per_s",
        static_cast<double>(after.decode_only_tokens - before_.decode_only_tokens) / decode_seconds);
  for (const auto& [name, sum] : loss_sums_)
    out.emplace_back(name, sum / static_cast<double>(std::max<std::size_t>(1, num_trained_)));
  for (const auto& [name, value] : experience_.metrics) out.emplace_back(name, value);
  const double steps = static_cast<double>(std::max<std::size_t>(1, num_optimized_));
  out.emplace_back("train/gradient_norm", gradient_norms_ / steps);
  if (models_.critic) out.emplace_back("train/critic_gradient_norm", critic_gradient_norms_ / steps);
  out.emplace_back("train/skipped_steps", skipped_steps_);
  out.emplace_back("train/learning_rate", learning_rate(models_.policy_optimizer.options()));
  out.emplace_back("train/kl_coefficient", kl_.coefficient());
  return out;
}

}  // namespace rlhf

#include "rlhf/train/ppo_iteration.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "rlhf/core/error.h"
#include "rlhf/core/hash.h"
#include "rlhf/ppo/policy_loss.h"
#include "rlhf/ppo/value_loss.h"
#include "rlhf/schedule/batching_rules.h"
#include "rlhf/train/batching.h"
#include "rlhf/train/ppo_pass.h"

namespace rlhf {
namespace {

// Where the algorithm names no longest response, it is the rollout's limit, and where it names no correction
// of samples from rounded weights, it is that of the stage.
ppo::PpoOptions algorithm_of(const PpoSetting& setting) {
  ppo::PpoOptions algorithm = setting.options.algorithm;
  std::size_t& limit = algorithm.reward.length.max_response_tokens;
  if (limit == 0) limit = static_cast<std::size_t>(setting.rollout.max_new_tokens);
  if (setting.options.corrects_rounding(setting.rollout)) {
    algorithm.correction.level = ppo::CorrectionLevel::kToken;
    algorithm.correction.mode = ppo::CorrectionMode::kTruncate;
  }
  return algorithm;
}

using Keep = SequencePass<float>::Keep;

std::vector<float> narrow(const std::vector<double>& values) {
  return {values.begin(), values.end()};
}

}  // namespace

// Flat arrays of some responses' training data, response by response.
struct PpoIteration::Rows {
  std::vector<std::size_t> offsets{0};
  const Indices& samples;
  const std::vector<Place>& places;
  std::vector<std::size_t> ppo::Experience::*all_offsets;

  Rows(const Indices& chosen, const std::vector<Place>& where,
       std::vector<std::size_t> ppo::Experience::*experience_offsets)
      : samples(chosen), places(where), all_offsets(experience_offsets) {
    for (std::size_t i : samples) offsets.push_back(offsets.back() + end(i) - begin(i));
  }
  std::size_t begin(std::size_t i) const { return (places[i].experience->*all_offsets)[places[i].row]; }
  std::size_t end(std::size_t i) const { return (places[i].experience->*all_offsets)[places[i].row + 1]; }
  std::size_t length(std::size_t s) const { return offsets[s + 1] - offsets[s]; }

  template <class T>
  std::vector<T> gather(std::vector<T> ppo::Experience::*field) const {
    std::vector<T> values;
    for (std::size_t i : samples) {
      const std::vector<T>& all = places[i].experience->*field;
      if (all.empty()) return {};
      values.insert(values.end(), all.begin() + at(begin(i)), all.begin() + at(end(i)));
    }
    return values;
  }
};

PpoIteration::PpoIteration(const PpoSetting& setting, PpoModels& models, PpoState& state,
                           std::int64_t iteration, const PpoSamples& samples)
    : setting_(setting),
      algorithm_(algorithm_of(setting)),
      models_(models),
      state_(state),
      iteration_(iteration),
      responses_(samples.responses),
      greedy_responses_(samples.greedy),
      ranks_(samples.ranks),
      collective_(*setting.context.collective),
      whole_batch_(needs_whole_batch(setting) || collective_.world_size() > 1),
      places_(samples.responses.size()),
      in_first_update_(samples.responses.size()),
      pool_(setting.options.max_tokens_per_micro_batch, members(0).size()),
      updates_(num_optimizer_steps(algorithm_)) {
  for (std::size_t i : members(0)) in_first_update_[i] = true;
}

std::vector<std::span<const TokenId>> PpoIteration::sequences(const Indices& samples) const {
  std::vector<std::span<const TokenId>> sequences;
  for (std::size_t i : samples) sequences.push_back(responses_[i].tokens);
  return sequences;
}

// ---- advantages ----

std::size_t num_optimizer_steps(const ppo::PpoOptions& algorithm) {
  const std::size_t n = algorithm.prompts_per_step * algorithm.samples_per_prompt;
  return algorithm.epochs * std::min(algorithm.mini_batches, n);
}

// The responses of an optimizer step, in the order drawn for its epoch.
PpoIteration::Indices PpoIteration::members(std::size_t step) const {
  const std::size_t unit = schedule::mini_batch_unit(algorithm_.prompts_per_step,
                                                     algorithm_.samples_per_prompt, algorithm_.mini_batches);
  const std::size_t n = responses_.size() / unit, parts = std::min(algorithm_.mini_batches, n);
  const std::size_t epoch = step / parts, m = step % parts;
  const auto order = epoch_order(n, setting_.context.seed ^ 0x0bad5eed,
                                 static_cast<std::uint64_t>(iteration_) * algorithm_.epochs + epoch);
  Indices members;
  for (std::size_t i = m * n / parts; i < (m + 1) * n / parts; ++i)
    for (std::size_t k = 0; k < unit; ++k) members.push_back(order[i] * unit + k);
  return members;
}

void PpoIteration::compute_advantages(std::span<const std::size_t> samples) {
  num_advantaged_ += samples.size();
  const std::vector<Indices> groups = split_into_groups(samples);
  if (setting_.data.rules.normalizes()) add_normalized_rules(groups);
  if (!whole_batch_)
    for (const Indices& group : groups) prepare_group(group);
  if (num_advantaged_ == responses_.size()) complete();
}

std::vector<PpoIteration::Indices> PpoIteration::split_into_groups(
    std::span<const std::size_t> samples) const {
  std::vector<Indices> groups;
  for (std::size_t i : samples) {
    if (groups.empty() || responses_[groups.back().front()].scored.group != responses_[i].scored.group)
      groups.emplace_back();
    groups.back().push_back(i);
  }
  return groups;
}

void PpoIteration::add_normalized_rules(const std::vector<Indices>& groups) {
  const auto scores_of = [&](const Indices& group) {
    std::vector<const Score*> scores;
    for (std::size_t i : group) scores.push_back(&responses_[i].rule_score);
    return scores;
  };
  if (needs_whole_batch(setting_)) {
    Indices all(responses_.size());
    std::iota(all.begin(), all.end(), std::size_t{0});
    state_.terms.observe(scores_of(all));
  }
  for (const Indices& group : groups) {
    const auto totals = state_.terms.totals(scores_of(group), number());
    for (std::size_t k = 0; k < group.size(); ++k)
      responses_[group[k]].scored.score += setting_.options.rules_weight * totals[k];
  }
}

// A response without advantage is not computed where its gradient would be 0: with group baselines that is
// every group whose answers are all alike.
bool PpoIteration::trains(std::size_t response) const {
  if (responses_[response].scored.unscored) return false;
  const bool distils = algorithm_.distillation.coefficient > 0 &&
                       algorithm_.distillation.estimate == ppo::DistillationEstimate::kExact;
  if (models_.critic || distils || !ppo::vanishes_with_advantage(algorithm_.policy)) return true;
  const auto& [experience, row] = places_[response];
  for (std::size_t t = experience->offsets[row]; t < experience->offsets[row + 1]; ++t)
    if (experience->mask[t] && experience->advantages[t] != 0) return true;
  return false;
}

// A group whose advantages need no other: what belongs to the first optimizer step can be trained at once.
void PpoIteration::prepare_group(const Indices& group) {
  Update& update = updates_.front();
  update.begun_early = true;
  update.policy.total_tokens = update.policy.total_sequences = 1;
  update.value = update.policy;
  std::vector<ppo::ScoredResponse> scored;
  bool counts = false;
  for (std::size_t i : group) {
    scored.push_back(responses_[i].scored);
    counts |= ppo::has_counting_token(algorithm_, scored.back());
  }
  if (counts) {
    parts_.push_back(ppo::compute_experience(algorithm_, state_.kl.coefficient(), scored));
    for (std::size_t k = 0; k < group.size(); ++k) places_[group[k]] = {&parts_.back(), k};
  }
  Indices trained;
  std::size_t skipped = 0;
  for (std::size_t i : group) {
    if (!in_first_update_[i]) continue;
    if (counts && trains(i))
      trained.push_back(i);
    else
      ++skipped;
  }
  for (Indices& part : pool_.add(trained, sequences(trained), skipped))
    update.micro_batches.push_back(std::move(part));
}

void PpoIteration::normalize_scores(std::vector<ppo::ScoredResponse>& scored) {
  std::vector<double> scores;
  for (const ppo::ScoredResponse& response : scored)
    if (!response.unscored) scores.push_back(response.score);
  state_.scores.observe(scores);
  for (ppo::ScoredResponse& response : scored) {
    response.score = state_.scores.normalize(response.score);
    response.greedy_score = state_.scores.normalize(response.greedy_score);
  }
}

void PpoIteration::complete() {
  std::vector<ppo::ScoredResponse> scored;
  for (const PpoResponse& response : responses_) scored.push_back(response.scored);
  normalize_scores(scored);
  experience_ = ppo::compute_experience(algorithm_, state_.kl.coefficient(), scored);
  state_.kl.update(experience_.mean_kl, scored.size());
  for (std::size_t i = 0; i < places_.size(); ++i) places_[i] = {&experience_, i};
  parts_.clear();
  for (std::size_t step = 0; step < updates_.size(); ++step) plan_update(step);
  for (std::size_t i = 0; i < responses_.size(); ++i) num_skipped_ += !trains(i);
}

void PpoIteration::plan_update(std::size_t step) {
  Update& update = updates_[step];
  const Indices chosen = members(step);
  const Rows tokens(chosen, places_, &ppo::Experience::offsets);
  const auto mask = tokens.gather(&ppo::Experience::mask);
  const auto totals = ppo::scope_totals(algorithm_.policy, {tokens.offsets, mask});
  ppo::AggregationContext value_totals;
  if (models_.critic) {
    const Rows values(chosen, places_, &ppo::Experience::value_offsets);
    const auto value_mask = values.gather(&ppo::Experience::value_mask);
    value_totals = ppo::scope_totals(algorithm_.value.aggregation, {values.offsets, value_mask});
  }
  if (update.begun_early) {
    update.policy_divisor = ppo::scope_divisor(algorithm_.policy, totals);
    update.value_divisor = ppo::scope_divisor(algorithm_.value.aggregation, value_totals);
    return;
  }
  update.policy = totals;
  update.value = value_totals;
  Indices trained;
  std::ranges::copy_if(chosen, std::back_inserter(trained), [&](std::size_t i) { return trains(i); });
  for (const Indices& part :
       own_training_passes(collective_, sequences(trained), setting_.options.max_tokens_per_micro_batch)) {
    update.micro_batches.emplace_back();
    for (std::size_t i : part) update.micro_batches.back().push_back(trained[i]);
  }
}

// ---- train ----

void PpoIteration::train(std::size_t step, std::size_t micro_batch) {
  const Indices& samples = updates_.at(step).micro_batches.at(micro_batch);
  if (samples.empty()) return skip_micro_batch();
  const Pass pass(responses_, samples, setting_.options.padded_passes);
  const auto memory =
      models_.memory->begin_pass(PassShape::of(pass.rows, pass.targets.size()), models_.trained_layers());
  run_trunk(samples, pass);
  train_policy(samples, pass, step);
  if (models_.critic) train_critic(samples, pass, step);
  ++num_trained_;
}

// Other ranks have one more.
void PpoIteration::skip_micro_batch() {
  models_.pass.skip_backward(models_.policy.parameters().weights());
  if (models_.critic) models_.pass.skip_backward(models_.critic->weights());
}

void PpoIteration::train_policy(const Indices& samples, const Pass& pass, std::size_t step) {
  const auto& weights = models_.policy.parameters().weights();
  const double temperature = setting_.rollout.sampling.temperature;
  std::vector<float> logprobs(pass.targets.size()), entropies(pass.targets.size());
  models_.pass.forward(weights, pass.rows, Keep::kForBackward);
  models_.pass.token_logprobs(weights, pass.targets, temperature, logprobs, entropies);

  const Rows tokens(samples, places_, &ppo::Experience::offsets);
  const std::vector<double> log_probs(logprobs.begin(), logprobs.end());
  const std::vector<double> entropy(entropies.begin(), entropies.end());
  const auto mask = tokens.gather(&ppo::Experience::mask);
  const auto old_log_probs = tokens.gather(&ppo::Experience::old_log_probs);
  const auto advantages = tokens.gather(&ppo::Experience::advantages);
  const auto reference = tokens.gather(&ppo::Experience::reference_log_probs);
  const auto importance = tokens.gather(&ppo::Experience::importance_weights);
  const auto behaviour = tokens.gather(&ppo::Experience::rollout_log_probs);
  ppo::PolicyLossInputs inputs;
  inputs.rows = {tokens.offsets, mask};
  inputs.log_probs = log_probs;
  inputs.old_log_probs = old_log_probs;
  inputs.advantages = advantages;
  inputs.reference_log_probs = reference;
  inputs.entropies = entropy;
  inputs.importance_weights = importance;
  inputs.behaviour_log_probs = behaviour;
  inputs.context = updates_[step].policy;
  // The random choice of clip_cov differs from micro-batch to micro-batch.
  const std::uint64_t place[] = {static_cast<std::uint64_t>(iteration_),
                                 num_trained_ + (static_cast<std::uint64_t>(collective_.rank()) << 32)};
  inputs.seed = hash_values(std::span<const std::uint64_t>(place), setting_.context.seed);
  if (step == 0) measure_mismatch(inputs);
  const ppo::PolicyLossResult loss = ppo::policy_loss(algorithm_.policy, inputs);
  if (!std::isfinite(loss.loss))
    fail<Error>("ppo: the policy loss of iteration ", iteration_ + 1, " is ", loss.loss,
                " in a micro-batch of prompts ", prompt_ids(samples));
  models_.pass.token_logprobs_backward(weights, pass.targets, temperature, narrow(loss.d_log_probs),
                                       narrow(loss.d_entropies));
  if (models_.teacher) add_distillation(pass, inputs, step);
  models_.pass.backward(weights, pass.rows);

  auto& losses = updates_[step].losses;
  losses["loss/policy"] += loss.policy_loss;
  if (algorithm_.policy.kl.coefficient > 0) losses["loss/kl"] += loss.kl_loss;
  pass_sums_["policy/clip_fraction"] += loss.metrics.clip_fraction;
  pass_sums_["policy/approx_kl"] += loss.metrics.approx_kl_k2;
  pass_sums_["policy/ratio_mean"] += loss.metrics.ratio_mean;
  pass_sums_["policy/ratio_variance"] += loss.metrics.ratio_variance;
  pass_sums_["policy/entropy"] += std::accumulate(entropy.begin(), entropy.end(), 0.0) /
                                  static_cast<double>(std::max<std::size_t>(1, entropy.size()));
}

// Sampler against trainer, before the weights move: in the first optimizer step.
void PpoIteration::measure_mismatch(const ppo::PolicyLossInputs& inputs) {
  if (inputs.behaviour_log_probs.empty()) return;
  for (std::size_t t = 0; t < inputs.rows.positions(); ++t) {
    if (!inputs.rows.counts(t)) continue;
    const double log_ratio = inputs.log_probs[t] - inputs.behaviour_log_probs[t];
    mismatch_k1_ -= log_ratio;
    mismatch_k3_ += std::expm1(log_ratio) - log_ratio;
    ++mismatch_count_;
  }
}

// The exact reverse KL to the teacher as a loss, aggregated as the policy loss.
void PpoIteration::add_distillation(const Pass& pass, const ppo::PolicyLossInputs& inputs, std::size_t step) {
  if (algorithm_.distillation.estimate != ppo::DistillationEstimate::kExact) return;
  std::vector<double> weights =
      ppo::aggregation_weights(algorithm_.policy.aggregation, inputs.rows, inputs.context);
  for (double& weight : weights) weight *= algorithm_.distillation.coefficient;
  updates_[step].losses["loss/distillation"] +=
      models_.teacher->add_reverse_kl(models_.pass, models_.policy.parameters().weights(), pass.rows,
                                      pass.targets, weights, setting_.rollout.sampling.temperature);
}

void PpoIteration::train_critic(const Indices& samples, const Pass& pass, std::size_t step) {
  const auto& weights = models_.critic->weights();
  const Rows selection(samples, places_, &ppo::Experience::value_offsets);
  std::vector<std::int64_t> rows;
  for (std::size_t s = 0; s < samples.size(); ++s)
    for (std::size_t t = 0; t < selection.length(s); ++t)
      rows.push_back(pass.rows.row(s, responses_[samples[s]].predictor(t)));
  std::vector<float> outputs(rows.size());
  models_.pass.forward(weights, pass.rows, Keep::kForBackward);
  models_.pass.scalar_outputs(weights, rows, outputs);

  const std::vector<double> values(outputs.begin(), outputs.end());
  const auto mask = selection.gather(&ppo::Experience::value_mask);
  const auto old_values = selection.gather(&ppo::Experience::old_values);
  const auto returns = selection.gather(&ppo::Experience::returns);
  const ppo::ValueLossResult loss = ppo::value_loss(
      algorithm_.value, {{selection.offsets, mask}, values, old_values, returns, updates_[step].value});
  if (!std::isfinite(loss.loss))
    fail<Error>("ppo: the value loss of iteration ", iteration_ + 1, " is ", loss.loss,
                " in a micro-batch of prompts ", prompt_ids(samples));
  models_.pass.scalar_outputs_backward(weights, rows, narrow(loss.d_values));
  models_.pass.backward(weights, pass.rows);

  updates_[step].losses["loss/value"] += loss.loss;
  pass_sums_["value/clip_fraction"] += loss.clip_fraction;
  pass_sums_["value/explained_variance"] += loss.explained_variance;
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

void PpoIteration::optimize(std::size_t step) {
  const Compute<float>& compute = setting_.context.compute;
  const Update& update = updates_.at(step);
  const auto take = [&](Optimizer<float>& optimizer, Parameters<float>& parameters, double divisor,
                        double& norms) {
    const auto result = optimizer.step(compute, parameters, learning_rate(optimizer.options()), 1 / divisor);
    if (result.skipped)
      ++skipped_steps_;
    else
      norms += result.gradient_norm;
  };
  take(models_.policy_optimizer, models_.policy.parameters(), update.policy_divisor, gradient_norms_);
  if (models_.critic)
    take(*models_.critic_optimizer, *models_.critic, update.value_divisor, critic_gradient_norms_);
  for (const auto& [name, sum] : update.losses)
    loss_sums_[name] += sum / (name == "loss/value" ? update.value_divisor : update.policy_divisor);
  if (++num_optimized_ == updates_.size()) add_measures_of_ranks();
}

}  // namespace rlhf

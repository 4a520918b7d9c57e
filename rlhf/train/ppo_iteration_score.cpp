// The scoring half of PpoIteration: what rules and models say about the samples.
#include <algorithm>
#include <cmath>

#include "rlhf/core/error.h"
#include "rlhf/train/batching.h"
#include "rlhf/train/group_sampler.h"
#include "rlhf/train/ppo_iteration.h"
#include "rlhf/train/ppo_pass.h"
#include "rlhf/train/rank_exchange.h"
#include "rlhf/train/token_distributions.h"

namespace rlhf {
namespace {

using Keep = SequencePass<float>::Keep;

}  // namespace

bool PpoIteration::recompute_old_log_probs() const {
  const OldLogProbs choice = setting_.options.old_log_probs;
  if (choice != OldLogProbs::kAuto) return choice == OldLogProbs::kRecompute;
  if (setting_.rollout.is_rounded()) return true;
  // Off policy, a correction compares the sampler's log-probs with those of the weights that are trained.
  const ppo::RolloutCorrectionOptions& correction = algorithm_.correction;
  if (correction.bypass && correction.rejection.empty()) return false;
  const bool corrects = correction.level != ppo::CorrectionLevel::kOff || !correction.rejection.empty();
  if (setting_.schedule.staleness() > 0 && corrects) return true;
  const SamplingOptions& sampling = setting_.rollout.sampling;
  return !keeps_all(sampling) || sampling.repetition_penalty != 1 || sampling.presence_penalty != 0 ||
         sampling.frequency_penalty != 0;
}

// Whether scoring needs a pass of the policy itself.
bool PpoIteration::runs_policy() const {
  return recompute_old_log_probs() || ppo::needs_sum_pi_squared(algorithm_);
}

bool PpoIteration::has_next_value(const PpoResponse& response) const {
  return algorithm_.value_positions == ppo::ValuePositions::kTokensAndNext &&
         static_cast<std::int64_t>(response.sample.tokens.size()) < setting_.rollout.max_new_tokens;
}

void PpoIteration::score(std::span<const std::size_t> samples) {
  if (collective_.world_size() == 1) return score_own(samples);
  Indices own;
  for (std::size_t i : samples)
    if (ranks_[i] == collective_.rank()) own.push_back(i);
  if (!own.empty()) score_own(own);
  exchange_scores(collective_, responses_, ranks_);
}

void PpoIteration::score_own(std::span<const std::size_t> samples) {
  check_staleness(samples);
  const Stopwatch watch;
  for (std::size_t i : samples) {
    models_.judges.judge_by_rules(responses_[i], number());
    responses_[i].scored.unscored = responses_[i].rule_score.dropped;
    // Normalised terms wait for the other responses.
    responses_[i].scored.score =
        setting_.data.rules.normalizes() ? 0 : setting_.options.rules_weight * responses_[i].rule_score.total;
  }
  const Indices all(samples.begin(), samples.end());
  if (!greedy_responses_.empty()) score_greedy(all);
  judge_seconds_ += watch.seconds();
  const bool models = models_.reference || models_.teacher || models_.reward || models_.critic;
  if (!models && !runs_policy()) return;
  for (const Indices& part : split_into_passes(sequences(all), setting_.options.max_tokens_per_micro_batch)) {
    Indices chosen;
    for (std::size_t i : part) chosen.push_back(all[i]);
    score_by_models(chosen);
  }
}

// Versions that a token's weights lie behind those it is trained on.
void PpoIteration::check_staleness(std::span<const std::size_t> samples) {
  for (std::size_t i : samples)
    for (const WeightVersion version : responses_[i].sample.weight_versions) {
      const auto staleness = static_cast<double>(iteration_ - static_cast<std::int64_t>(version));
      if (staleness < 0 || staleness > static_cast<double>(setting_.schedule.staleness()))
        fail<InternalError>("ppo: a token of prompt ", responses_[i].prompt->id, " was sampled with weights ",
                            version, " and is trained in iteration ", iteration_,
                            "; schedule.max_staleness is ", setting_.schedule.staleness());
      staleness_sum_ += staleness;
      staleness_max_ = std::max(staleness_max_, staleness);
      ++staleness_count_;
    }
}

// The layers that no model of the stage trains: once for all of them, and once an iteration while there is
// room, which may have been in the generator.
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
  if (models_.sampled_trunk) return;  // what is not kept did not fit
  std::size_t bytes = 0;
  for (std::size_t i : samples) bytes += responses_[i].tokens.size() * D * sizeof(float);
  if (trunk_bytes_ + bytes > models_.trunk_cache_bytes) return;
  trunk_bytes_ += bytes;
  for (std::size_t i : samples) responses_[i].trunk.resize(responses_[i].tokens.size() * D);
  for_tokens([&](PpoResponse& r, std::size_t p, std::size_t row) {
    std::copy_n(models_.pass.trunk() + row * D, D, r.trunk.data() + p * D);
  });
}

// Log-probs of all response tokens of a pass, after its trunk.
std::vector<double> PpoIteration::log_probs(const DecoderWeights<float>& weights, const Pass& pass) {
  std::vector<float> flat(pass.targets.size());
  models_.pass.forward(weights, pass.rows, Keep::kNothing);
  models_.pass.token_logprobs(weights, pass.targets, setting_.rollout.sampling.temperature, flat, {});
  return {flat.begin(), flat.end()};
}

// Sums of squared probabilities where the response tokens of a pass are predicted, after its forward.
std::vector<double> PpoIteration::squared_probabilities(const DecoderWeights<float>& weights,
                                                        const Pass& pass) {
  std::vector<std::int64_t> rows;
  for (const TokenTarget& target : pass.targets) rows.push_back(target.row);
  return sums_of_squared_probabilities(models_.pass, weights, rows, setting_.rollout.sampling.temperature);
}

std::vector<double> PpoIteration::scalars(const DecoderWeights<float>& weights, const PackedRows& packed,
                                          const std::vector<std::int64_t>& rows, std::size_t num_outputs) {
  std::vector<float> values(rows.size() * num_outputs);
  models_.pass.forward(weights, packed, Keep::kNothing);
  models_.pass.scalar_outputs(weights, rows, values);
  return {values.begin(), values.end()};
}

// One pass over some responses: models that share a trunk run it once.
void PpoIteration::score_by_models(const Indices& samples) {
  const Pass pass(responses_, samples, setting_.options.padded_passes);
  const bool asks_log_probs = runs_policy() || models_.reference;
  const auto memory =
      models_.memory->begin_pass(PassShape::of(pass.rows, asks_log_probs ? pass.targets.size() : 0), 0);
  run_trunk(samples, pass);
  if (runs_policy()) score_by_policy(samples, pass);
  if (models_.reference)
    give(samples, log_probs(models_.reference->weights(), pass), &ppo::ScoredResponse::reference_log_probs);
  if (models_.teacher)
    give(samples, models_.teacher->log_probs(pass.rows, pass.targets, setting_.rollout.sampling.temperature),
         &ppo::ScoredResponse::teacher_log_probs);
  if (models_.reward) score_by_reward_model(samples, pass);
  if (models_.critic) score_by_critic(samples, pass);
}

// Hands numbers of response tokens, response by response, to a field of each.
void PpoIteration::give(const Indices& samples, const std::vector<double>& flat,
                        std::vector<double> ppo::ScoredResponse::*field) {
  auto next = flat.begin();
  for (std::size_t i : samples) {
    const auto end = next + at(responses_[i].sample.tokens.size());
    (responses_[i].scored.*field).assign(next, end);
    next = end;
  }
}

void PpoIteration::score_by_policy(const Indices& samples, const Pass& pass) {
  const DecoderWeights<float>& policy = models_.policy.parameters().weights();
  const std::vector<double> recomputed = log_probs(policy, pass);
  if (ppo::needs_sum_pi_squared(algorithm_))
    give(samples, squared_probabilities(policy, pass), &ppo::ScoredResponse::sum_pi_squared);
  if (!recompute_old_log_probs()) return;
  give(samples, recomputed, &ppo::ScoredResponse::log_probs);
  measure_gap(samples);
}

void PpoIteration::score_by_reward_model(const Indices& samples, const Pass& pass) {
  const RewardReading& reading = setting_.data.reward_reading;
  std::vector<std::int64_t> rows;
  std::vector<std::vector<std::size_t>> positions;
  for (std::size_t s = 0; s < samples.size(); ++s) {
    const TrainingExample answer = to_example(responses_[samples[s]]);
    positions.push_back(reading.positions(answer.tokens, answer.loss_mask));
    for (const std::size_t position : positions.back())
      rows.push_back(pass.rows.row(s, static_cast<std::int64_t>(position)));
  }
  const auto outputs = scalars(models_.reward->weights(), pass.rows, rows, reading.num_outputs());
  auto next = outputs.begin();
  for (std::size_t s = 0; s < samples.size(); ++s) {
    const auto end = next + at(positions[s].size() * reading.num_outputs());
    take_model_score(responses_[samples[s]], {next, end}, positions[s]);
    next = end;
  }
}

// One score beside that of the rules, or with step_rewards a reward where each step ends.
void PpoIteration::take_model_score(PpoResponse& response, std::vector<double> outputs,
                                    const std::vector<std::size_t>& positions) {
  const double weight = setting_.options.reward_model_weight;
  response.model_outputs = std::move(outputs);
  response.model_score = setting_.data.reward_reading.score(response.model_outputs);
  if (!setting_.options.step_rewards) {
    response.scored.score += weight * response.model_score;
    return;
  }
  response.scored.step_rewards.assign(response.sample.tokens.size(), 0.0);
  for (std::size_t k = 0; k < positions.size(); ++k)
    response.scored.step_rewards[positions[k] - response.prompt->tokens.size()] +=
        weight * response.model_outputs[k];
}

void PpoIteration::score_by_critic(const Indices& samples, const Pass& pass) {
  std::vector<std::int64_t> rows;
  const auto num_values = [&](std::size_t i) {
    return responses_[i].sample.tokens.size() + has_next_value(responses_[i]);
  };
  // The last state of each comes behind its values.
  for (std::size_t s = 0; s < samples.size(); ++s) {
    for (std::size_t t = 0; t < num_values(samples[s]); ++t)
      rows.push_back(pass.rows.row(s, responses_[samples[s]].predictor(t)));
    rows.push_back(pass.rows.row(s, static_cast<std::int64_t>(responses_[samples[s]].tokens.size()) - 1));
  }
  const auto values = scalars(models_.critic->weights(), pass.rows, rows);
  const bool bootstraps = algorithm_.advantage.gae.bootstrap_truncated;
  auto next = values.begin();
  for (std::size_t i : samples) {
    ppo::ScoredResponse& scored = responses_[i].scored;
    scored.values.assign(next, next + at(num_values(i)));
    next += at(num_values(i));
    if (bootstraps && scored.truncated) scored.bootstrap_value = *next;
    ++next;
  }
}

void PpoIteration::measure_gap(const Indices& samples) {
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

// ---- ReMax ----

// The greedy response of a group is judged as its samples are.
void PpoIteration::score_greedy(const Indices& samples) {
  Indices groups;
  for (std::size_t i : samples) groups.push_back(responses_[i].scored.group);
  std::ranges::sort(groups);
  groups.erase(std::unique(groups.begin(), groups.end()), groups.end());
  for (std::size_t group : groups) models_.judges.judge_by_rules(greedy_responses_[group], number());
  if (models_.reward) {
    std::vector<std::span<const TokenId>> sequences;
    for (std::size_t group : groups) sequences.emplace_back(greedy_responses_[group].tokens);
    for (const Indices& part : split_into_passes(sequences, setting_.options.max_tokens_per_micro_batch)) {
      Indices chosen;
      for (std::size_t k : part) chosen.push_back(groups[k]);
      score_greedy_by_model(chosen);
    }
  }
  for (std::size_t i : samples) {
    const SampledResponse& greedy = greedy_responses_[responses_[i].scored.group];
    responses_[i].scored.unscored |= greedy.rule_score.dropped;
    responses_[i].scored.greedy_score = setting_.options.rules_weight * greedy.rule_score.total +
                                        setting_.options.reward_model_weight * greedy.model_score;
  }
}

void PpoIteration::score_greedy_by_model(const Indices& groups) {
  const RewardReading& reading = setting_.data.reward_reading;
  std::vector<std::span<const TokenId>> sequences;
  for (std::size_t group : groups) sequences.emplace_back(greedy_responses_[group].tokens);
  const PackedRows packed(sequences);
  std::vector<std::int64_t> rows;
  std::vector<std::size_t> counts;
  for (std::size_t s = 0; s < groups.size(); ++s) {
    const TrainingExample answer = to_example(greedy_responses_[groups[s]]);
    const auto positions = reading.positions(answer.tokens, answer.loss_mask);
    for (const std::size_t position : positions)
      rows.push_back(packed.row(s, static_cast<std::int64_t>(position)));
    counts.push_back(positions.size() * reading.num_outputs());
  }
  const auto memory = models_.memory->begin_pass(PassShape::of(packed, 0), 0);
  models_.pass.drop_trunk();
  const auto outputs = scalars(models_.reward->weights(), packed, rows, reading.num_outputs());
  auto next = outputs.begin();
  for (std::size_t s = 0; s < groups.size(); ++s) {
    SampledResponse& greedy = greedy_responses_[groups[s]];
    greedy.model_outputs.assign(next, next + at(counts[s]));
    greedy.model_score = reading.score(greedy.model_outputs);
    next += at(counts[s]);
  }
}

}  // namespace rlhf

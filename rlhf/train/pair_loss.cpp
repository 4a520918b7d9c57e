#include "rlhf/train/pair_loss.h"

namespace rlhf {
namespace {

ExampleBatch examples_of(const std::vector<const TrainingPair*>& pairs) {
  ExampleBatch batch;
  batch.per_item = 2;
  for (const TrainingPair* pair : pairs) {
    batch.examples.push_back(&pair->chosen);
    batch.examples.push_back(&pair->rejected);
  }
  return batch;
}

std::vector<double> pick(const std::vector<double>& values, const std::vector<std::size_t>& items) {
  if (values.empty()) return {};
  std::vector<double> picked;
  for (std::size_t item : items) picked.push_back(values[item]);
  return picked;
}

}  // namespace

void PairMeasure::add_ranks(Collective& collective) {
  double all[] = {static_cast<double>(pairs),
                  static_cast<double>(correct),
                  loss,
                  chosen_reward,
                  rejected_reward,
                  chosen_log_prob,
                  rejected_log_prob};
  collective.all_reduce(std::span(all));
  *this = {static_cast<std::size_t>(all[0]),
           static_cast<std::size_t>(all[1]),
           all[2],
           all[3],
           all[4],
           all[5],
           all[6]};
}

Metrics PairMeasure::metrics() const {
  return {{"accuracy", accuracy()},
          {"margin", chosen_reward - rejected_reward},
          {"chosen_reward", chosen_reward},
          {"rejected_reward", rejected_reward},
          {"chosen_log_prob", chosen_log_prob},
          {"rejected_log_prob", rejected_log_prob}};
}

PairBatch PairLoss::refer(const std::vector<const TrainingPair*>& pairs,
                          const DecoderWeights<float>& reference) {
  PairBatch batch{pairs, {}, {}};
  if (!ppo::needs_reference(options_)) return batch;
  const auto sums = compute_log_probs(pass_, reference, examples_of(pairs), setting_).row_sums();
  const auto middle = sums.begin() + static_cast<std::ptrdiff_t>(pairs.size());
  batch.reference_chosen.assign(sums.begin(), middle);
  batch.reference_rejected.assign(middle, sums.end());
  return batch;
}

std::vector<double> PairLoss::add_loss(const PairBatch& batch, const TokenLogProbs& log_probs,
                                       PairMeasure& measure) const {
  const std::vector<double> chosen = pick(batch.reference_chosen, log_probs.items),
                            rejected = pick(batch.reference_rejected, log_probs.items);
  ppo::PreferenceResult result =
      ppo::preference_loss(options_, {log_probs.rows(), log_probs.values, chosen, rejected});
  const double share = 1 / static_cast<double>(batch.pairs.size());
  const std::size_t pairs = log_probs.items.size();
  const auto sums = log_probs.row_sums();
  for (std::size_t i = 0; i < pairs; ++i) {
    measure.correct += result.chosen_rewards[i] > result.rejected_rewards[i];
    measure.chosen_reward += share * result.chosen_rewards[i];
    measure.rejected_reward += share * result.rejected_rewards[i];
    measure.chosen_log_prob += share * sums[i];
    measure.rejected_log_prob += share * sums[i + pairs];
  }
  const double part = share * static_cast<double>(pairs);
  measure.pairs += pairs;
  measure.loss += part * result.loss;
  for (double& derivative : result.d_log_probs) derivative *= part;
  return std::move(result.d_log_probs);
}

PairMeasure PairLoss::measure(const PairBatch& batch, const DecoderWeights<float>& policy) {
  PairMeasure measure;
  if (!batch.pairs.empty())
    add_loss(batch, compute_log_probs(pass_, policy, examples_of(batch.pairs), setting_), measure);
  return measure;
}

PairMeasure PairLoss::train(const PairBatch& batch, const DecoderWeights<float>& policy) {
  PairMeasure measure;
  const LossScope scope = ppo::needs_whole_batch(options_) ? LossScope::kBatch : LossScope::kMicroBatch;
  add_gradient(pass_, policy, examples_of(batch.pairs), setting_, scope,
               [&](const TokenLogProbs& log_probs) { return add_loss(batch, log_probs, measure); });
  if (scope == LossScope::kMicroBatch) measure.add_ranks(*setting_.collective);
  return measure;
}

}  // namespace rlhf

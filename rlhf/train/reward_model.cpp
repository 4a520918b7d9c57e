#include "rlhf/train/reward_model.h"

#include <array>
#include <cmath>

#include "rlhf/core/error.h"
#include "rlhf/train/training_steps.h"

namespace rlhf {
namespace {

using Pass = SequencePass<float>;

double sigmoid(double x) {
  return 1 / (1 + std::exp(-x));
}
// log(1 + exp(x)) without overflow.
double softplus(double x) {
  return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x));
}

std::int64_t pair_tokens(const TrainingPair& pair) {
  return static_cast<std::int64_t>(pair.chosen.tokens.size() + pair.rejected.tokens.size());
}

struct StepSums {
  double loss = 0, correct = 0, margin = 0;
};

// Adds the gradient of the micro-batch's share of the mean over `pairs_in_step`.
void train_micro_batch(Pass& pass, const DecoderWeights<float>& weights,
                       const std::vector<const TrainingPair*>& pairs, const RewardModelOptions& options,
                       std::size_t pairs_in_step, StepSums& sums) {
  std::vector<std::span<const TokenId>> sequences;
  for (const TrainingPair* pair : pairs) {
    sequences.push_back(pair->chosen.tokens);
    sequences.push_back(pair->rejected.tokens);
  }
  const PackedRows rows(sequences);
  std::vector<std::int64_t> last;
  for (std::size_t s = 0; s < sequences.size(); ++s) last.push_back(rows.last_row(s));
  std::vector<float> scores(last.size()), gradient(last.size());
  pass.forward(weights, rows, Pass::Keep::kForBackward);
  pass.scalar_outputs(weights, last, scores);
  const double share = 1 / static_cast<double>(pairs_in_step);
  for (std::size_t p = 0; p < pairs.size(); ++p) {
    const double chosen = static_cast<double>(scores[2 * p]),
                 rejected = static_cast<double>(scores[2 * p + 1]);
    const double logit = chosen - rejected - pairs[p]->margin, sum = chosen + rejected;
    sums.loss += share * (softplus(-logit) + options.centring * sum * sum);
    sums.correct += share * (chosen > rejected);
    sums.margin += share * (chosen - rejected);
    const double slope = -sigmoid(-logit), centre = 2 * options.centring * sum;
    gradient[2 * p] = static_cast<float>(share * (slope + centre));
    gradient[2 * p + 1] = static_cast<float>(share * (-slope + centre));
  }
  pass.scalar_outputs_backward(weights, last, gradient);
  pass.backward(weights, rows);
}

}  // namespace

std::vector<double> score_sequences(Pass& pass, const DecoderWeights<float>& weights,
                                    const std::vector<std::span<const TokenId>>& sequences,
                                    std::int64_t max_tokens_per_pass) {
  for (const auto& sequence : sequences)
    RLHF_CHECK(!sequence.empty(), "score_sequences: an empty sequence has no score");
  std::vector<double> scores(sequences.size());
  for (const auto& batch : split_into_passes(sequences, max_tokens_per_pass)) {
    std::vector<std::span<const TokenId>> part;
    for (std::size_t i : batch) part.push_back(sequences[i]);
    const PackedRows rows(part);
    std::vector<std::int64_t> last;
    for (std::size_t s = 0; s < part.size(); ++s) last.push_back(rows.last_row(s));
    std::vector<float> values(last.size());
    pass.forward(weights, rows, Pass::Keep::kNothing);
    pass.scalar_outputs(weights, last, values);
    for (std::size_t s = 0; s < batch.size(); ++s) scores[batch[s]] = static_cast<double>(values[s]);
  }
  return scores;
}

PairAccuracy evaluate_pairs(Pass& pass, const DecoderWeights<float>& weights,
                            const std::vector<TrainingPair>& pairs) {
  PairAccuracy result;
  if (pairs.empty()) return result;
  std::vector<std::span<const TokenId>> sequences;
  for (const TrainingPair& pair : pairs) {
    sequences.push_back(pair.chosen.tokens);
    sequences.push_back(pair.rejected.tokens);
  }
  const auto scores = score_sequences(pass, weights, sequences, 2048);
  // Confidence of the model in its own choice against how often that choice is right.
  constexpr std::size_t kBins = 10;
  std::array<double, kBins> confidence{}, correct{}, count{};
  for (std::size_t p = 0; p < pairs.size(); ++p) {
    const double margin = scores[2 * p] - scores[2 * p + 1];
    const double probability = sigmoid(std::abs(margin));
    const auto bin = std::min(kBins - 1, static_cast<std::size_t>((probability - 0.5) * 2 * kBins));
    confidence[bin] += probability;
    correct[bin] += margin > 0;
    count[bin] += 1;
    result.accuracy += margin > 0;
    result.mean_margin += margin;
  }
  const double n = static_cast<double>(pairs.size());
  for (std::size_t b = 0; b < kBins; ++b)
    if (count[b] > 0) result.calibration_error += std::abs(confidence[b] - correct[b]) / n;
  result.pairs = static_cast<std::int64_t>(pairs.size());
  result.accuracy /= n;
  result.mean_margin /= n;
  return result;
}

PairAccuracy run_reward_model(Parameters<float>& reward, const std::vector<TrainingPair>& train,
                              const std::vector<TrainingPair>& held_out, const RewardModelOptions& options,
                              const StageContext& context) {
  RLHF_CHECK(!train.empty(), "reward: there are no pairs");
  Pass pass(reward.config(), context.compute);
  TrainingPlan plan{"reward", "reward"};
  plan.num_items = train.size();
  plan.items_per_step = options.pairs_per_step;
  plan.epochs = options.epochs;
  plan.max_steps = options.max_steps;
  plan.optimizer = options.optimizer;
  run_steps(reward, plan, context, [&](const std::vector<std::size_t>& items, std::int64_t) {
    std::vector<std::span<const TokenId>> sequences;
    StepMeasure measure;
    for (std::size_t item : items) {
      sequences.push_back(train[item].chosen.tokens);
      sequences.push_back(train[item].rejected.tokens);
      measure.tokens += pair_tokens(train[item]);
    }
    StepSums sums;
    for (const auto& batch : split_into_passes(sequences, options.max_tokens_per_micro_batch, 2)) {
      std::vector<const TrainingPair*> chosen;
      for (std::size_t i : batch) chosen.push_back(&train[items[i]]);
      train_micro_batch(pass, reward.weights(), chosen, options, items.size(), sums);
    }
    measure.loss = sums.loss;
    measure.metrics = {{"accuracy", sums.correct}, {"margin", sums.margin}};
    return measure;
  });
  return evaluate_pairs(pass, reward.weights(), held_out);
}

}  // namespace rlhf

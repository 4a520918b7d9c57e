#include "rlhf/train/reward_model.h"

#include "rlhf/core/error.h"
#include "rlhf/train/batching.h"
#include "rlhf/train/reward_rating.h"

namespace rlhf {
namespace {

using Pass = SequencePass<float>;

std::int64_t pair_tokens(const TrainingPair& pair) {
  return static_cast<std::int64_t>(pair.chosen.tokens.size() + pair.rejected.tokens.size());
}

struct StepSums {
  double loss = 0, correct = 0, margin = 0;
};

// Adds the gradient of the micro-batch's share of the mean over `pairs_in_step`. It may be empty.
void train_micro_batch(Pass& pass, const DecoderWeights<float>& weights,
                       const std::vector<const TrainingPair*>& pairs, const RewardModelOptions& options,
                       std::size_t pairs_in_step, StepSums& sums) {
  if (pairs.empty()) return pass.skip_backward(weights);
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
  std::vector<double> chosen, rejected, margins;
  for (std::size_t p = 0; p < pairs.size(); ++p) {
    chosen.push_back(scores[2 * p]);
    rejected.push_back(scores[2 * p + 1]);
    margins.push_back(pairs[p]->margin);
  }
  const ppo::RewardModelResult loss = ppo::reward_model_loss(options.loss, {chosen, rejected, margins});
  const double share = static_cast<double>(pairs.size()) / static_cast<double>(pairs_in_step);
  sums.loss += share * loss.loss;
  sums.correct += share * loss.accuracy;
  sums.margin += share * loss.margin;
  for (std::size_t p = 0; p < pairs.size(); ++p) {
    gradient[2 * p] = static_cast<float>(share * loss.d_chosen[p]);
    gradient[2 * p + 1] = static_cast<float>(share * loss.d_rejected[p]);
  }
  pass.scalar_outputs_backward(weights, last, gradient);
  pass.backward(weights, rows);
}

}  // namespace

TrainingPlan reward_plan(const RewardModelOptions& options, std::size_t num_items) {
  TrainingPlan plan{"reward", "reward"};
  plan.num_items = num_items;
  plan.items_per_step = options.pairs_per_step;
  plan.epochs = options.epochs;
  plan.max_steps = options.max_steps;
  plan.optimizer = options.optimizer;
  return plan;
}

PairAccuracy evaluate_pairs(Pass& pass, const DecoderWeights<float>& weights, const RewardReading& reading,
                            const std::vector<TrainingPair>& pairs) {
  PairAccuracy result;
  if (pairs.empty()) return result;
  std::vector<TrainingExample> answers;
  for (const TrainingPair& pair : pairs) {
    answers.push_back(pair.chosen);
    answers.push_back(pair.rejected);
  }
  std::vector<double> scores;
  for (const auto& outputs : read_outputs(pass, weights, reading, answers, kRatedTokensPerPass))
    scores.push_back(reading.score(outputs));
  std::vector<double> chosen, rejected;
  const double share = 1 / static_cast<double>(pairs.size());
  for (std::size_t p = 0; p < pairs.size(); ++p) {
    chosen.push_back(scores[2 * p]);
    rejected.push_back(scores[2 * p + 1]);
    result.accuracy += share * (chosen[p] > rejected[p]);
    result.mean_margin += share * (chosen[p] - rejected[p]);
  }
  result.pairs = static_cast<std::int64_t>(pairs.size());
  result.calibration_error = ppo::pairwise_calibration_error(chosen, rejected, kCalibrationBins);
  return result;
}

void run_reward_model(Parameters<float>& reward, const std::vector<TrainingPair>& train,
                      const RewardModelOptions& options, const StageContext& context) {
  RLHF_CHECK(!train.empty(), "reward: there are no pairs");
  Pass pass(reward.config(), context.compute, context.recompute);
  run_steps(reward, reward_plan(options, train.size()), context,
            [&](const std::vector<std::size_t>& items, std::int64_t) {
              std::vector<std::span<const TokenId>> sequences;
              StepMeasure measure;
              for (std::size_t item : items) {
                sequences.push_back(train[item].chosen.tokens);
                sequences.push_back(train[item].rejected.tokens);
                measure.tokens += pair_tokens(train[item]);
              }
              StepSums sums;
              for (const auto& batch : own_training_passes(*context.collective, sequences,
                                                           options.max_tokens_per_micro_batch, 2)) {
                std::vector<const TrainingPair*> chosen;
                for (std::size_t i : batch) chosen.push_back(&train[items[i]]);
                train_micro_batch(pass, reward.weights(), chosen, options, items.size(), sums);
              }
              double all[] = {sums.loss, sums.correct, sums.margin};
              context.collective->all_reduce(std::span(all));
              measure.loss = all[0];
              measure.metrics = {{"accuracy", all[1]}, {"margin", all[2]}};
              return measure;
            });
}

}  // namespace rlhf

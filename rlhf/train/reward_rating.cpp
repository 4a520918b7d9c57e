#include "rlhf/train/reward_rating.h"

#include <algorithm>

#include "rlhf/core/error.h"
#include "rlhf/train/batching.h"

namespace rlhf {
namespace {

using Pass = SequencePass<float>;

// Adds the gradient of the micro-batch's share of the mean over `numbers_in_step`; it may be empty. Returns
// its share of the loss.
double train_micro_batch(Pass& pass, const DecoderWeights<float>& weights,
                         const std::vector<const RatedExample*>& rated, std::size_t num_outputs,
                         std::size_t numbers_in_step) {
  if (rated.empty()) {
    pass.skip_backward(weights);
    return 0;
  }
  std::vector<std::span<const TokenId>> sequences;
  for (const RatedExample* item : rated) sequences.emplace_back(item->example.tokens);
  const PackedRows packed(sequences);
  std::vector<std::int64_t> rows;
  std::vector<double> targets;
  for (std::size_t s = 0; s < rated.size(); ++s) {
    for (const std::size_t position : rated[s]->positions)
      rows.push_back(packed.row(s, static_cast<std::int64_t>(position)));
    targets.insert(targets.end(), rated[s]->targets.begin(), rated[s]->targets.end());
  }
  std::vector<float> values(rows.size() * num_outputs), gradient(values.size());
  pass.forward(weights, packed, Pass::Keep::kForBackward);
  pass.scalar_outputs(weights, rows, values);
  const std::vector<double> outputs(values.begin(), values.end());
  const ppo::RegressionResult loss = ppo::regression_loss(outputs, targets);
  const double share = static_cast<double>(targets.size()) / static_cast<double>(numbers_in_step);
  for (std::size_t i = 0; i < gradient.size(); ++i)
    gradient[i] = static_cast<float>(share * loss.d_outputs[i]);
  pass.scalar_outputs_backward(weights, rows, gradient);
  pass.backward(weights, packed);
  return share * loss.loss;
}

}  // namespace

std::vector<std::vector<double>> read_outputs(Pass& pass, const DecoderWeights<float>& weights,
                                              const RewardReading& reading,
                                              const std::vector<TrainingExample>& answers,
                                              std::int64_t max_tokens_per_pass) {
  std::vector<std::span<const TokenId>> sequences;
  for (const TrainingExample& answer : answers) sequences.emplace_back(answer.tokens);
  std::vector<std::vector<double>> outputs(answers.size());
  for (const auto& batch : split_into_passes(sequences, max_tokens_per_pass)) {
    std::vector<std::span<const TokenId>> part;
    for (std::size_t i : batch) part.push_back(sequences[i]);
    const PackedRows packed(part);
    std::vector<std::int64_t> rows;
    std::vector<std::size_t> counts;
    for (std::size_t s = 0; s < batch.size(); ++s) {
      const auto positions = reading.positions(part[s], answers[batch[s]].loss_mask);
      for (const std::size_t position : positions)
        rows.push_back(packed.row(s, static_cast<std::int64_t>(position)));
      counts.push_back(positions.size() * reading.num_outputs());
    }
    std::vector<float> values(rows.size() * reading.num_outputs());
    pass.forward(weights, packed, Pass::Keep::kNothing);
    pass.scalar_outputs(weights, rows, values);
    auto next = values.begin();
    for (std::size_t s = 0; s < batch.size(); ++s) {
      const auto end = next + static_cast<std::ptrdiff_t>(counts[s]);
      outputs[batch[s]].assign(next, end);
      next = end;
    }
  }
  return outputs;
}

std::vector<ppo::RegressionQuality> evaluate_ratings(Pass& pass, const DecoderWeights<float>& weights,
                                                     const RewardReading& reading,
                                                     const std::vector<RatedExample>& rated) {
  std::vector<TrainingExample> answers;
  for (const RatedExample& item : rated) answers.push_back(item.example);
  const auto outputs = read_outputs(pass, weights, reading, answers, kRatedTokensPerPass);
  std::vector<ppo::RegressionQuality> quality;
  for (std::size_t k = 0; k < reading.num_outputs(); ++k) {
    std::vector<double> predicted, targets;
    for (std::size_t i = 0; i < rated.size(); ++i)
      for (std::size_t n = k; n < outputs[i].size(); n += reading.num_outputs()) {
        predicted.push_back(outputs[i][n]);
        targets.push_back(rated[i].targets[n]);
      }
    quality.push_back(ppo::regression_quality(predicted, targets, kCalibrationBins));
  }
  return quality;
}

void run_reward_rating(Parameters<float>& reward, const std::vector<RatedExample>& train,
                       const RewardReading& reading, const RewardModelOptions& options,
                       const StageContext& context) {
  RLHF_CHECK(!train.empty(), "reward: there are no rated answers");
  Pass pass(reward.config(), context.compute, context.recompute);
  run_steps(reward, reward_plan(options, train.size()), context,
            [&](const std::vector<std::size_t>& items, std::int64_t) {
              std::vector<std::span<const TokenId>> sequences;
              StepMeasure measure;
              std::size_t numbers = 0;
              for (std::size_t item : items) {
                sequences.emplace_back(train[item].example.tokens);
                numbers += train[item].targets.size();
                measure.tokens += static_cast<std::int64_t>(train[item].example.tokens.size());
              }
              for (const auto& batch :
                   own_training_passes(*context.collective, sequences, options.max_tokens_per_micro_batch)) {
                std::vector<const RatedExample*> chosen;
                for (std::size_t i : batch) chosen.push_back(&train[items[i]]);
                measure.loss +=
                    train_micro_batch(pass, reward.weights(), chosen, reading.num_outputs(), numbers);
              }
              context.collective->all_reduce(std::span(&measure.loss, 1));
              return measure;
            });
}

}  // namespace rlhf

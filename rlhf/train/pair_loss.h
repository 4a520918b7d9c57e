#pragma once

#include <vector>

#include "rlhf/ppo/preference_loss.h"
#include "rlhf/train/example_pass.h"
#include "rlhf/train/training_steps.h"

namespace rlhf {

/// Pairs that enter one preference loss, with what the reference thinks of them.
struct PairBatch {
  std::vector<const TrainingPair*> pairs;
  /// Summed log-probs of the responses under the reference, nats; empty for losses without one.
  std::vector<double> reference_chosen, reference_rejected;
};

/// How a policy orders pairs; means over pairs. A reward is beta times the log-ratio to the reference
/// (without a reference: beta times the mean log-prob of a token); a log-prob is that of a whole response.
struct PairMeasure {
  std::size_t pairs = 0, correct = 0;  ///< correct: the chosen reward is the larger
  double loss = 0;
  double chosen_reward = 0, rejected_reward = 0, chosen_log_prob = 0, rejected_log_prob = 0;

  double accuracy() const { return pairs ? static_cast<double>(correct) / static_cast<double>(pairs) : 0; }
  /// Adds up what the ranks have measured of their pairs of one batch.
  void add_ranks(Collective& collective);
  /// All but the loss, by the names in docs/reference/metrics.md.
  Metrics metrics() const;
};

/// Preference losses of a policy's pairs, forward and backward.
class PairLoss {
 public:
  /// @param pass of the policy's architecture; must outlive this
  PairLoss(const ppo::PreferenceOptions& options, const PassSetting& setting, SequencePass<float>& pass)
      : options_(options), setting_(setting), pass_(pass) {}

  /// Pairs with the log-probs of `reference`, which is asked only when the loss needs one.
  PairBatch refer(const std::vector<const TrainingPair*>& pairs, const DecoderWeights<float>& reference);
  /// The loss without a gradient. An empty batch measures nothing.
  PairMeasure measure(const PairBatch& batch, const DecoderWeights<float>& policy);
  /// Adds the gradient of the mean loss over the batch, however its pairs fall into passes.
  PairMeasure train(const PairBatch& batch, const DecoderWeights<float>& policy);

 private:
  // The loss of some of the batch's pairs, added to `measure` with their share of the batch. Returns the
  // derivative of that share by each log-prob.
  std::vector<double> add_loss(const PairBatch& batch, const TokenLogProbs& log_probs,
                               PairMeasure& measure) const;

  ppo::PreferenceOptions options_;
  PassSetting setting_;
  SequencePass<float>& pass_;
};

}  // namespace rlhf

#pragma once

#include <vector>

#include "rlhf/ppo/preference_loss.h"
#include "rlhf/train/example_pass.h"
#include "rlhf/train/stage.h"

namespace rlhf {

/// Labelled responses that enter one unpaired loss, with what the reference thinks of them.
struct LabelledBatch {
  std::vector<const LabelledExample*> examples;
  std::vector<double> reference;  ///< summed log-probs of the responses under the reference, nats
  /// KTO: each prompt with the response to another one, and their log-probs under the reference. The policy's
  /// mean log-ratio on them is the point that rewards are compared with. Empty: the point is 0.
  std::vector<const TrainingExample*> mismatched;
  std::vector<double> mismatched_reference;
};

/// How a policy rates labelled responses. A reward is beta times the log-ratio to the reference.
struct LabelledMeasure {
  double loss = 0;
  double kl = 0;  ///< KTO's reference point, nats
  std::size_t desirable = 0, undesirable = 0;
  double desirable_rewards = 0, undesirable_rewards = 0;  ///< sums

  /// Adds up what the ranks have measured of their responses of one batch.
  void add_ranks(Collective& collective);
  /// All but the loss, by the names in docs/reference/metrics.md. A mean over no responses is left out.
  Metrics metrics() const;
};

/// For every example its prompt with the response of the nearest earlier example (going round) that answers
/// another prompt, as TRL's KTO makes them before it shuffles.
/// @param max_tokens longer ones are passed over
/// @throws InvalidArgument when an example has no such partner
std::vector<TrainingExample> make_mismatched(const std::vector<LabelledExample>& examples,
                                             std::int64_t max_tokens);

/// KTO (Ethayarajh et al. 2024) and its relatives on a policy's responses.
class UnpairedLoss {
 public:
  /// @param pass of the policy's architecture; must outlive this
  UnpairedLoss(const ppo::UnpairedOptions& options, const PassSetting& setting, SequencePass<float>& pass)
      : options_(options), setting_(setting), pass_(pass) {}

  /// Examples with the log-probs of `reference`.
  LabelledBatch refer(const std::vector<const LabelledExample*>& examples,
                      const std::vector<const TrainingExample*>& mismatched,
                      const DecoderWeights<float>& reference);
  /// Adds the gradient of the mean loss over the batch, however its examples fall into passes.
  LabelledMeasure train(const LabelledBatch& batch, const DecoderWeights<float>& policy);

 private:
  ppo::UnpairedOptions options_;
  PassSetting setting_;
  SequencePass<float>& pass_;
};

}  // namespace rlhf

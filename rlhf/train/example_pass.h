#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "rlhf/distributed/collective.h"
#include "rlhf/model/sequence_pass.h"
#include "rlhf/ppo/rows.h"
#include "rlhf/train/task_data.h"

namespace rlhf {

/// Number of tokens that carry loss; a sequence's first token is predicted by nothing and has none.
std::size_t count_loss_tokens(const TrainingExample& example);

/// Examples that enter one loss, items of `per_item` each: item i is examples[i * per_item] and those behind
/// it (per_item 2: chosen, rejected). The examples outlive this.
struct ExampleBatch {
  std::vector<const TrainingExample*> examples;
  std::size_t per_item = 1;

  std::size_t num_items() const { return examples.size() / per_item; }
};

/// Log-probs of the tokens with loss of some items of a batch. Row k * items.size() + i is the k-th example
/// of items[i]: the first examples of all items come first.
struct TokenLogProbs {
  std::vector<std::size_t> items;
  std::vector<std::size_t> offsets;  ///< [rows + 1]
  std::vector<double> values;        ///< [offsets.back()], nats

  ppo::TokenRows rows() const { return {offsets, {}}; }
  /// Sums of the rows.
  std::vector<double> row_sums() const;
};

/// How a batch is worked through, and by whom.
struct PassSetting {
  std::int64_t max_tokens = 1024;  ///< rows of one pass; heads that sequences have in common count once
  Collective* collective = &one_process();  ///< of the ranks that share the batch
};

/// Computes the log-probs of a batch's tokens with loss, all items in order, without a gradient. Ranks
/// compute a part each and get all.
TokenLogProbs compute_log_probs(SequencePass<float>& pass, const DecoderWeights<float>& weights,
                                const ExampleBatch& batch, const PassSetting& setting);

/// What a loss looks at when it is taken.
enum class LossScope {
  /// Each item by itself: the loss is called for every micro-batch with its items, on the rank that has it.
  kMicroBatch,
  /// All items at once, the same on every rank: several micro-batches cost a second forward pass.
  kBatch,
};

/// Returns the derivative of the batch's loss by each of the given log-probs.
using TokenLoss = std::function<std::vector<double>(const TokenLogProbs&)>;

/// Adds the gradient of a loss of token log-probs to the weights' gradient, on each rank the part of its own
/// items. Sums over micro-batches; with a loss that fits its scope the result does not depend on how items
/// fall into them.
void add_gradient(SequencePass<float>& pass, const DecoderWeights<float>& weights, const ExampleBatch& batch,
                  const PassSetting& setting, LossScope scope, const TokenLoss& loss);

}  // namespace rlhf

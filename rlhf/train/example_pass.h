#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

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

/// Computes the log-probs of a batch's tokens with loss, all items in order, without a gradient.
/// @param max_tokens rows of one pass; heads that sequences have in common count once
TokenLogProbs compute_log_probs(SequencePass<float>& pass, const DecoderWeights<float>& weights,
                                const ExampleBatch& batch, std::int64_t max_tokens);

/// What a loss looks at when it is taken.
enum class LossScope {
  kMicroBatch,  ///< each item by itself: the loss is called for every micro-batch with its items
  kBatch,       ///< all items at once: several micro-batches cost a second forward pass
};

/// Returns the derivative of the batch's loss by each of the given log-probs.
using TokenLoss = std::function<std::vector<double>(const TokenLogProbs&)>;

/// Adds the gradient of a loss of token log-probs to the weights' gradient. Sums over micro-batches of at
/// most `max_tokens` rows; with a loss that fits its scope the result does not depend on how items fall into
/// them.
void add_gradient(SequencePass<float>& pass, const DecoderWeights<float>& weights, const ExampleBatch& batch,
                  std::int64_t max_tokens, LossScope scope, const TokenLoss& loss);

}  // namespace rlhf

#include "rlhf/train/example_pass.h"

#include <algorithm>
#include <numeric>

#include "rlhf/core/error.h"
#include "rlhf/train/batching.h"

namespace rlhf {
namespace {

using Pass = SequencePass<float>;
using Items = std::vector<std::size_t>;

const TrainingExample& example_of(const ExampleBatch& batch, const Items& items, std::size_t row) {
  return *batch.examples[items[row % items.size()] * batch.per_item + row / items.size()];
}

std::vector<std::span<const TokenId>> sequences_of(const ExampleBatch& batch, const Items& items) {
  std::vector<std::span<const TokenId>> sequences;
  for (std::size_t row = 0; row < items.size() * batch.per_item; ++row)
    sequences.push_back(example_of(batch, items, row).tokens);
  return sequences;
}

// Log-probs yet to be filled in.
TokenLogProbs empty_log_probs(const ExampleBatch& batch, Items items) {
  TokenLogProbs log_probs;
  log_probs.offsets = {0};
  for (std::size_t row = 0; row < items.size() * batch.per_item; ++row)
    log_probs.offsets.push_back(log_probs.offsets.back() + count_loss_tokens(example_of(batch, items, row)));
  log_probs.values.resize(log_probs.offsets.back());
  log_probs.items = std::move(items);
  return log_probs;
}

// Some items laid out for a pass.
struct Layout {
  PackedRows rows;
  std::vector<TokenTarget> targets;  // row by row of the items' TokenLogProbs

  Layout(const ExampleBatch& batch, const Items& items) : rows(sequences_of(batch, items)) {
    for (std::size_t row = 0; row < items.size() * batch.per_item; ++row) {
      const TrainingExample& example = example_of(batch, items, row);
      for (std::size_t t = 1; t < example.tokens.size(); ++t)
        if (example.loss_mask[t])
          targets.push_back({rows.row(row, static_cast<std::int64_t>(t) - 1), example.tokens[t]});
    }
  }
};

TokenLogProbs forward(Pass& pass, const DecoderWeights<float>& weights, const ExampleBatch& batch,
                      const Items& items, const Layout& layout, Pass::Keep keep) {
  TokenLogProbs log_probs = empty_log_probs(batch, items);
  std::vector<float> values(layout.targets.size());
  pass.forward(weights, layout.rows, keep);
  pass.token_logprobs(weights, layout.targets, 1, values, {});
  std::ranges::copy(values, log_probs.values.begin());
  return log_probs;
}

// After a forward pass of the same layout that kept its activations.
void backward(Pass& pass, const DecoderWeights<float>& weights, const Layout& layout,
              const std::vector<double>& derivatives) {
  const std::vector<float> gradient(derivatives.begin(), derivatives.end());
  pass.token_logprobs_backward(weights, layout.targets, 1, gradient, {});
  pass.backward(weights, layout.rows);
}

std::vector<std::span<const TokenId>> sequences_of(const ExampleBatch& batch) {
  std::vector<std::span<const TokenId>> sequences;
  for (const TrainingExample* example : batch.examples) sequences.push_back(example->tokens);
  return sequences;
}

// Calls visit(position in `part`, position in `whole`) for every value of a part of the batch.
template <class Visit>
void for_each_value(const TokenLogProbs& part, const TokenLogProbs& whole, const Visit& visit) {
  const std::size_t num_rows = part.offsets.size() - 1;
  for (std::size_t row = 0; row < num_rows; ++row) {
    const std::size_t k = row / part.items.size(), item = part.items[row % part.items.size()];
    const std::size_t first = whole.offsets[k * whole.items.size() + item];
    for (std::size_t i = part.offsets[row]; i < part.offsets[row + 1]; ++i)
      visit(i, first + i - part.offsets[row]);
  }
}

}  // namespace

std::size_t count_loss_tokens(const TrainingExample& example) {
  std::size_t count = 0;
  for (std::size_t t = 1; t < example.tokens.size(); ++t) count += example.loss_mask[t] != 0;
  return count;
}

std::vector<double> TokenLogProbs::row_sums() const {
  std::vector<double> sums;
  for (std::size_t row = 0; row + 1 < offsets.size(); ++row)
    sums.push_back(ppo::row_sum(rows(), row, values));
  return sums;
}

TokenLogProbs compute_log_probs(Pass& pass, const DecoderWeights<float>& weights, const ExampleBatch& batch,
                                const PassSetting& setting) {
  Items all(batch.num_items());
  std::iota(all.begin(), all.end(), std::size_t{0});
  TokenLogProbs whole = empty_log_probs(batch, std::move(all));
  for (const Items& items :
       own_passes(*setting.collective, sequences_of(batch), setting.max_tokens, batch.per_item)) {
    const Layout layout(batch, items);
    const TokenLogProbs part = forward(pass, weights, batch, items, layout, Pass::Keep::kNothing);
    for_each_value(part, whole, [&](std::size_t i, std::size_t at) { whole.values[at] = part.values[i]; });
  }
  setting.collective->all_reduce(std::span(whole.values));  // each value is 0 but on one rank
  return whole;
}

void add_gradient(Pass& pass, const DecoderWeights<float>& weights, const ExampleBatch& batch,
                  const PassSetting& setting, LossScope scope, const TokenLoss& loss) {
  const std::vector<Items> parts =
      own_training_passes(*setting.collective, sequences_of(batch), setting.max_tokens, batch.per_item);
  const bool in_two_passes =
      scope == LossScope::kBatch && (parts.size() > 1 || setting.collective->world_size() > 1);
  TokenLogProbs whole;
  std::vector<double> derivatives;
  if (in_two_passes) {
    whole = compute_log_probs(pass, weights, batch, setting);
    derivatives = loss(whole);
  }
  for (const Items& items : parts) {
    if (items.empty()) {
      pass.skip_backward(weights);
      continue;
    }
    const Layout layout(batch, items);
    const TokenLogProbs part = forward(pass, weights, batch, items, layout, Pass::Keep::kForBackward);
    if (!in_two_passes) {
      backward(pass, weights, layout, loss(part));
      continue;
    }
    std::vector<double> own(part.values.size());
    for_each_value(part, whole, [&](std::size_t i, std::size_t at) { own[i] = derivatives[at]; });
    backward(pass, weights, layout, own);
  }
}

}  // namespace rlhf

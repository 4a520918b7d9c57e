#include "rlhf/train/micro_batch_pool.h"

#include "rlhf/core/error.h"
#include "rlhf/model/packed_rows.h"
#include "rlhf/schedule/batching_rules.h"

namespace rlhf {

std::vector<MicroBatchPool::Indices> MicroBatchPool::add(
    const Indices& indices, const std::vector<std::span<const TokenId>>& sequences, std::size_t num_skipped) {
  RLHF_CHECK(indices.size() == sequences.size() && indices.size() + num_skipped <= num_missing_,
             "MicroBatchPool: ", indices.size(), " indices for ", sequences.size(), " sequences, ",
             num_skipped, " skipped, ", num_missing_, " are missing");
  indices_.insert(indices_.end(), indices.begin(), indices.end());
  sequences_.insert(sequences_.end(), sequences.begin(), sequences.end());
  for (const auto& sequence : sequences) num_seen_tokens_ += sequence.size();
  num_seen_ += indices.size();
  num_missing_ -= indices.size() + num_skipped;
  return cut();
}

std::vector<MicroBatchPool::Indices> MicroBatchPool::cut() {
  if (indices_.empty()) return {};
  const std::size_t kept = schedule::num_kept_micro_batches(num_missing_, num_seen_, num_seen_tokens_,
                                                            static_cast<std::size_t>(max_rows_));
  std::vector<Indices> passes = split_into_passes(sequences_, max_rows_);
  if (passes.size() <= kept) return {};
  // All but the last are full.
  std::vector<Indices> ready;
  std::vector<bool> taken(indices_.size());
  for (std::size_t p = 0; p + kept < passes.size(); ++p) {
    ready.emplace_back();
    for (const std::size_t i : passes[p]) {
      ready.back().push_back(indices_[i]);
      taken[i] = true;
    }
  }
  std::size_t left = 0;
  for (std::size_t i = 0; i < indices_.size(); ++i)
    if (!taken[i]) {
      indices_[left] = indices_[i];
      sequences_[left++] = sequences_[i];
    }
  indices_.resize(left);
  sequences_.resize(left);
  return ready;
}

}  // namespace rlhf

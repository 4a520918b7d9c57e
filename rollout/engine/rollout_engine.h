#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "rlhf/model/decoder.h"
#include "rollout/cache/block_cache.h"
#include "rollout/engine/generation.h"

namespace rlhf {

struct RolloutEngineOptions {
  std::int64_t max_sequences = 64;         ///< samples that decode at once
  std::int64_t max_tokens_per_step = 512;  ///< decode tokens plus a chunk of prefill
  std::int64_t num_blocks = 0;             ///< K/V blocks of 16 tokens; sets the memory
};

/// Continuous batching over a paged K/V cache. Requests go in, finished samples come out one by one; a
/// finished sample leaves its slot at once and the next one enters. A request is admitted when blocks for its
/// longest possible response are free, so a running sample never has to wait for memory.
///
/// Which other requests run beside it never changes a sample: every row is computed in an order of its own,
/// and draws depend on (seed, prompt id, sample index, position) only.
///
/// Not thread-safe: one lane calls it.
class RolloutEngine {
 public:
  /// @param token_bytes text of one token, for stop strings and tools; may be empty when neither is used
  RolloutEngine(const ModelConfig& config, Compute<float> compute, const RolloutEngineOptions& options,
                std::function<std::string(TokenId)> token_bytes);
  ~RolloutEngine();

  /// K/V blocks that `num_sequences` samples of `max_tokens` tokens (prompt and response) need.
  static std::int64_t blocks_for(std::int64_t num_sequences, std::int64_t max_tokens);

  /// Queues a request. @throws InvalidArgument for an empty prompt, a prompt that leaves no room in the
  /// context, a token outside the vocabulary, bad sampling options, or a request larger than the whole cache.
  void submit(GenerationRequest request);
  /// True while requests are queued or running.
  bool busy() const;
  /// Runs one step with these weights: a chunk of prefill and one token for each running sample.
  /// @param version stored with every token that is sampled
  /// @throws Error naming the prompt when logits are NaN.
  void step(const DecoderWeights<float>& weights, WeightVersion version);
  /// The next finished sample, if any.
  std::optional<Sample> try_take();
  /// Cancels everything that is queued or running; finished samples stay.
  void cancel_all();
  /// Drops cached prefixes. Call when the weights have changed and no request is running.
  void forget_prefixes() { cache_.forget_published(); }

  const GenerationStatistics& statistics() const { return statistics_; }
  const BlockCache& cache() const { return cache_; }
  std::size_t kv_bytes() const { return store_.bytes(); }

 private:
  struct Group;
  struct Sequence;

  void admit();
  bool admit_group(Group& group);
  void fork(Group& group);
  void collect_rows();
  void sample_rows(const DecoderWeights<float>& weights, WeightVersion version);
  void accept(Sequence& sequence, TokenId token, float logprob, WeightVersion version);
  void finish(Sequence& sequence, FinishReason reason);
  void finish_prefill(Group& group);

  ModelConfig config_;
  RolloutEngineOptions options_;
  DecoderRunner<float> runner_;
  KvStore<float> store_;
  BlockCache cache_;
  std::function<std::string(TokenId)> token_bytes_;
  std::deque<GenerationRequest> queue_;
  std::deque<std::unique_ptr<Group>> groups_;  ///< admitted, with samples still to start or running
  std::vector<std::unique_ptr<Sequence>> running_;
  std::deque<Sample> finished_;
  Rows rows_;
  struct SampledRow {
    Sequence* sequence;
    std::int64_t row;
  };
  std::vector<SampledRow> sampled_rows_;
  Buffer<float> x_, hidden_, logits_;
  GenerationStatistics statistics_;
};

}  // namespace rlhf

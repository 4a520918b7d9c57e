#pragma once

#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "rlhf/core/clock.h"
#include "rlhf/model/decoder.h"
#include "rlhf/tensor/arena.h"
#include "rollout/engine/draw_token.h"
#include "rollout/engine/generation.h"
#include "rollout/engine/lookahead.h"
#include "rollout/engine/response.h"
#include "rollout/engine/scheduler.h"
#include "rollout/engine/step_program.h"

namespace rlhf {

/// How an engine decodes. The samples are the same; all but kPaged are there to show what it is worth.
enum class Decoding {
  kPaged,     ///< continuous batching; samples share the K/V of their common heads
  kStatic,    ///< nothing is shared, and a sample that has ended is computed on until no other runs
  kUncached,  ///< as kStatic, and the K/V of all tokens are computed again for every token
};

/// Decode tokens plus chunks of prefill of one step; 0 = 512, on an accelerator 4096, which takes that many
/// to be busy.
inline std::int64_t step_tokens(std::int64_t asked, bool on_accelerator) {
  if (asked != 0) return asked;
  return on_accelerator ? 4096 : 512;
}

struct RolloutEngineOptions {
  std::int64_t max_sequences = 64;       ///< samples that decode at once
  std::int64_t max_tokens_per_step = 0;  ///< see step_tokens
  std::int64_t num_blocks = 0;           ///< K/V blocks of 16 tokens; sets the memory
  std::int64_t ageing_steps = 256;       ///< one level of priority counts as so many steps of waiting
  /// Samples that may be running, parked or finished and not taken; 0 = no bound. At the bound nothing is
  /// admitted until try_take is called. Cancelled and expired samples come on top.
  std::int64_t max_finished = 0;
  /// Rows that decoding and guesses of coming tokens may take together, where all samples decode and none
  /// waits; 0 = no guesses. A guess is taken only if it is what is drawn anyway, so samples do not change.
  std::int64_t max_draft_rows = 0;
  /// What a further row adds to a step, as a share of the step; guesses that promise less are not made.
  double draft_row_cost = 0.08;
  std::int64_t trunk_layers = 0;  ///< samples carry the hidden states behind so many layers; 0 = none
  KvFormat kv = KvFormat::kAuto;  ///< kFp8 on an accelerator only: K and V take half, and are rounded
  Decoding decoding = Decoding::kPaged;
  /// Opened with slabs of RolloutEngine::slab_bytes; K and V lie in it, and others may use what they leave.
  /// Must outlive the engine. Null = the engine has one of its own.
  Arena* arena = nullptr;
  Clock clock = steady_clock();  ///< of deadlines and statistics
};

/// Continuous batching over a paged K/V cache. Requests go in, finished samples come out one by one; a
/// finished sample leaves its slot at once and the next one enters. EngineScheduler decides what a step
/// computes; this class computes it. docs/design/rollout.md explains both.
///
/// A request is admitted when there are blocks for what it has; when its responses grow beyond the cache, the
/// last in rank are preempted and computed again later. Neither that, nor which other requests run beside it,
/// changes a sample: every row is computed in an order of its own, and draws depend on (seed, prompt id,
/// sample index, position) only. Only where weights change while it is preempted, its K/V are those of the
/// new ones.
///
/// Every sample of a submitted request comes out exactly once, unless cancel_all or an error of step drops
/// it.
///
/// Not thread-safe: one lane calls it.
class RolloutEngine {
 public:
  /// @param compute where it carries an accelerator, K and V and all computation are there
  /// @param token_bytes text of one token, for stop strings and tools; may be empty when neither is used
  RolloutEngine(const ModelConfig& config, Compute<float> compute, const RolloutEngineOptions& options,
                std::function<std::string(TokenId)> token_bytes);
  ~RolloutEngine();

  /// Bytes of K, V and kept states that one block takes where the engine computes.
  static std::size_t slab_bytes(const ModelConfig& config, const Compute<float>& compute,
                                std::int64_t trunk_layers, KvFormat kv = KvFormat::kAuto) {
    return slab_bytes_of(config, compute, trunk_layers, kv);
  }
  /// K/V blocks that `num_sequences` samples of `max_tokens` tokens (prompt and response) need.
  static std::int64_t blocks_for(std::int64_t num_sequences, std::int64_t max_tokens);

  /// Queues a request. @throws InvalidArgument for an empty prompt, a prompt that leaves no room in the
  /// context, a token outside the vocabulary, bad options, or a sample larger than the whole cache.
  RequestId submit(GenerationRequest request);
  /// True while requests are queued or running.
  bool busy() const { return scheduler_.busy(); }
  /// Runs one step with these weights: a token for each running sample and chunks of prefill. Replies of
  /// environments that have arrived are taken first; where every sample waits for one, it sleeps for at most
  /// 10 ms.
  /// @param version stored with every token that is sampled
  /// @return false when there was nothing to do: paused, idle, or the caller must take samples first
  /// @throws Error naming prompt, sample and layer when logits are not finite; that request is dropped, all
  /// others have made their step. @throws MemoryError when the block limit lets nothing run.
  bool step(const DecoderWeights<float>& weights, WeightVersion version);
  /// The next finished sample, if any.
  std::optional<Sample> try_take();
  /// Ends a request; what there is of its samples comes out with FinishReason::kCancelled. Unknown and
  /// finished requests are left alone. @return the number of samples ended
  std::size_t cancel(RequestId request);
  /// Drops everything that is queued or running; finished samples stay.
  void cancel_all();

  /// Between pause and resume, step does nothing. Running samples keep their blocks.
  void pause() { paused_ = true; }
  void resume() { paused_ = false; }

  /// Lets at most `limit` K/V blocks be in use from now on, 0 to num_blocks, and gives the others back at
  /// once, to the arena or, if that is the engine's own, to the system: what lies there moves. Samples that
  /// do not fit are preempted, the last in rank first. Between two steps only. @throws MemoryError when
  /// something else lies where the cache is to grow
  void set_block_limit(std::int64_t limit);
  /// Drops cached prefixes. Call when the weights have changed; running samples keep their K/V.
  void forget_prefixes() { scheduler_.forget_prefixes(); }

  GenerationStatistics statistics() const;
  const BlockCache& cache() const { return scheduler_.cache(); }
  const EngineScheduler& scheduler() const { return scheduler_; }
  /// Of K, V and kept states in all blocks.
  std::size_t kv_bytes() const { return block_bytes() * static_cast<std::size_t>(cache().num_blocks()); }
  std::size_t block_bytes() const {
    return slab_bytes(config_, compute_, options_.trunk_layers, options_.kv);
  }
  /// Bytes held beside the cache: what the largest step so far has needed.
  std::size_t workspace_bytes() const { return program_->workspace_bytes(); }

 private:
  struct SampledRow {
    Sequence* sequence;
    Response* response;
    std::int64_t row;
    std::size_t num_drafts;  ///< of the sequence before this row: it is drawn as if they were right
  };

  Response& response_of(Sequence& sequence);
  Sample make_sample(const SubmittedRequest& request, std::uint32_t index) const;
  void end_request_sample(RequestId id);
  void hand_out(const DroppedSample& dropped, FinishReason reason);
  void drop(RequestId request);

  bool take_replies(WeightVersion version);
  bool end_overdue(double now_s);
  void end_response(Response& response);
  void release(Sequence& sequence);
  bool has_ended(const Sequence& sequence) const;
  void go_on(Sequence& sequence, TokenId token);
  void release_ended();
  bool run_step(const DecoderWeights<float>& weights, WeightVersion version, double begin);
  void propose(Sequence& sequence, std::int64_t most, std::int64_t num_decoding);
  void place_rows(const StepPlan& plan);
  void compute(const DecoderWeights<float>& weights);
  std::int64_t accept_rows(const DecoderWeights<float>& weights, WeightVersion version);
  bool accept_row(std::size_t index, const DecoderWeights<float>& weights, WeightVersion version);
  [[noreturn]] void fail_not_finite(const SampledRow& row, const DecoderWeights<float>& weights,
                                    WeightVersion version);
  void set_slabs(std::int64_t slabs);

  ModelConfig config_;
  RolloutEngineOptions options_;
  Compute<float> compute_;
  std::unique_ptr<Arena> own_arena_;
  Arena& arena_;
  std::unique_ptr<StepProgram> program_;
  EngineScheduler scheduler_;
  bool has_text_;
  ResponseSetting setting_;
  std::map<RequestId, std::unique_ptr<SubmittedRequest>> requests_;      ///< with samples unfinished
  std::unordered_map<SequenceId, std::unique_ptr<Response>> responses_;  ///< that have run
  std::deque<Sample> finished_;
  std::vector<Sequence*> ended_;  ///< without Decoding::kPaged: handed out, and still computed
  bool paused_ = false;
  Lookahead lookahead_;
  std::unordered_map<SequenceId, std::vector<Lookahead::Guess>> guesses_;  ///< of this step
  std::int64_t draft_rows_ = 0;                                            ///< of this step
  Rows rows_;
  std::vector<SampledRow> sampled_rows_;
  std::vector<DrawnToken> drawn_;
  std::exception_ptr error_;  ///< of this step, thrown at its end
  GenerationStatistics statistics_;
};

}  // namespace rlhf

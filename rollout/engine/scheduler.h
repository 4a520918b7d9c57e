#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <vector>

#include "rlhf/core/ids.h"
#include "rollout/cache/block_cache.h"

namespace rlhf {

/// Names a submitted request; counts up from 1.
using RequestId = std::uint64_t;
/// Names one sample of a request for as long as it is unfinished; counts up from 1.
using SequenceId = std::uint64_t;

struct SchedulerOptions {
  std::int32_t max_sequences = 64;         ///< samples that hold K/V blocks at once
  std::int64_t max_tokens_per_step = 512;  ///< rows of one step: decode tokens and prefill chunks
  std::int32_t num_blocks = 0;             ///< K/V blocks there are
  std::int32_t block_tokens = 16;
  std::int64_t ageing_steps = 256;  ///< one level of priority counts as having come so many steps earlier
  std::int64_t max_finished = 0;    ///< samples running, parked or finished and not taken; 0 = no bound
  bool share_prefixes = true;       ///< off for comparisons only, like keep_kv
  bool keep_kv = true;              ///< false: K/V of all tokens are computed again for every token
};

/// What the scheduler must know about a request.
struct ScheduledRequest {
  std::vector<TokenId> prompt;  ///< at least one token
  std::uint32_t num_samples = 1;
  std::int64_t max_new_tokens = 1;
  int priority = 0;                          ///< higher goes first
  std::optional<std::int64_t> expires_step;  ///< dropped when this step begins
  std::optional<double> expires_s;           ///< dropped when a step begins at or after this time
};

/// One sample on its way, from the moment it is next in its request until it is finished or dropped.
struct Sequence {
  enum class State { kWaiting, kRunning, kParked };
  SequenceId id = 0;
  RequestId request = 0;
  std::uint32_t index = 0;                ///< among the samples of its request
  std::vector<TokenId> tokens;            ///< prompt and response so far
  std::int64_t prompt_tokens = 0;         ///< the first so many of them
  std::int64_t computed = 0;              ///< leading tokens whose K/V exist, or will after this step
  std::int64_t planned = 0;               ///< those of them that this step computes
  std::vector<std::int32_t> table;        ///< K/V blocks; empty before it has run and while preempted
  std::vector<BlockCache::NodeId> nodes;  ///< of its full blocks, as far as they are published
  std::int64_t admitted_step = 0;         ///< since when it runs
  std::int64_t generation = 0;            ///< of the published prefixes when its K/V began
  std::int64_t reached = 0;               ///< most tokens that ever had K/V
  std::vector<TokenId> drafts;            ///< guessed tokens behind `tokens`; gone after the step
  State state = State::kWaiting;

  std::int64_t length() const { return static_cast<std::int64_t>(tokens.size()); }
  std::int64_t uncomputed() const { return length() - computed; }
  bool running() const { return state == State::kRunning; }
  bool holds_blocks() const { return !table.empty(); }
};

/// A sample that will never finish: its request was cancelled or came too late.
struct DroppedSample {
  RequestId request = 0;
  std::uint32_t index = 0;
  SequenceId sequence = 0;  ///< 0 when it had never run
};

/// One step's work. Copies come first; then the K/V of all chunks are computed in one pass.
struct StepPlan {
  /// Tokens [begin, end) of a sequence. When they reach its end, the last one's logits are sampled, and those
  /// of its drafts, which follow it.
  struct Chunk {
    Sequence* sequence;
    std::int64_t begin, end;
    bool samples() const { return end == sequence->length(); }
  };
  std::vector<DroppedSample> expired;
  std::vector<BlockCache::Move> copies;
  std::vector<Chunk> chunks;
};

/// Writes guesses behind a sequence's last token into its `drafts`, at most as many as given.
using DraftProposer = std::function<void(Sequence& sequence, std::int64_t most)>;

/// What has happened since the scheduler was made.
struct SchedulerStatistics {
  std::int64_t steps = 0;
  std::int64_t preemptions = 0;
  std::int64_t recomputed_tokens = 0;     ///< K/V that a preemption lost, computed or to be computed again
  std::int64_t cached_prefix_tokens = 0;  ///< found published when a sequence was admitted
  std::int64_t forked_tokens = 0;         ///< shared with another sample of the same prompt
  std::int64_t longest_wait_steps = 0;    ///< from submission to the first chunk, of any request
};

/// Decides what every step computes: admission, chunks of prefill, preemption, deadlines. Knows tokens and
/// blocks, no model and no text; not thread-safe.
///
/// Samples are ordered by *rank*: the step in which their request came, minus `ageing_steps` for each level
/// of priority, then order of submission, then index. A rank never changes, so nothing that comes later than
/// `ageing_steps` times the difference in priority can overtake, and within a priority all is first come,
/// first served. Memory is given in order of rank and taken from the last: the first can always go on. Parked
/// samples take no part; their blocks go first when a running sample grows.
class EngineScheduler {
 public:
  explicit EngineScheduler(const SchedulerOptions& options);
  ~EngineScheduler();

  /// Queues a request. @throws InvalidArgument when one sample needs more blocks than the limit, or the
  /// prompt is empty, or a count is not positive.
  RequestId submit(ScheduledRequest request);
  /// Blocks that one sample needs at its longest.
  std::int32_t blocks_needed(std::int64_t prompt_tokens, std::int64_t max_new_tokens) const;
  /// Blocks for the tokens that a sequence has.
  std::int64_t blocks_now(const Sequence& sequence) const { return blocks_of(sequence.length()); }

  /// Decides the next step. Call append or finish afterwards for every chunk that samples.
  /// @param now_s time on the clock that deadlines refer to, seconds
  /// @param num_untaken finished samples that the caller has not taken
  /// @param propose asked, once all running samples decode and none waits, for guesses of how a sample goes
  /// on
  const StepPlan& plan(double now_s, std::int64_t num_untaken, const DraftProposer& propose = {});
  /// True when samples wait, none runs and the limit, not the caller, is why: only set_block_limit helps.
  bool stalled() const;

  /// Adds what was sampled (and forced after it) to a running sequence.
  void append(Sequence& sequence, std::span<const TokenId> tokens);
  /// After append: the sequence's last token is the draft that followed, whose K/V this step has computed, so
  /// the draft behind it, or the last draft's own logits, can be sampled next.
  void accept_draft(Sequence& sequence);
  /// Takes a running sequence that was just appended to out of the steps until `resume`: its environment is
  /// at work. It keeps its K/V as long as nobody else needs the blocks.
  void park(Sequence& sequence);
  /// Adds what the environment said to a parked sequence, which waits for its turn in order of rank; only
  /// tokens without K/V are computed.
  void resume(Sequence& sequence, std::span<const TokenId> tokens);
  /// Ends a sequence in any state and gives its blocks back; the reference is invalid afterwards.
  void finish(Sequence& sequence);
  /// Drops every unfinished sample of a request. @return them in order of index; nothing for an unknown or
  /// finished request
  std::vector<DroppedSample> cancel(RequestId request);
  void cancel_all();

  /// Lets at most `limit` blocks be in use from now on; the last in rank are preempted. 0 preempts all.
  /// Between two steps only. @return what has moved, so that only the first `limit` blocks hold anything; to
  /// be copied. @throws InvalidArgument outside 0 to num_blocks.
  std::vector<BlockCache::Move> set_block_limit(std::int32_t limit);
  /// Forgets published prefixes: the weights have changed. Running sequences keep their K/V.
  void forget_prefixes();

  bool busy() const { return !requests_.empty(); }
  std::int64_t num_running() const { return static_cast<std::int64_t>(running_.size()); }
  std::int64_t num_parked() const { return num_parked_; }
  std::int64_t step() const { return statistics_.steps; }
  const BlockCache& cache() const { return cache_; }
  const SchedulerStatistics& statistics() const { return statistics_; }
  /// The sequence that goes first, running or waiting; null when there is none.
  const Sequence* first_in_rank() const;
  /// Checks the invariants. @throws InternalError.
  void check() const;

 private:
  struct Request;
  /// Smaller goes first.
  struct Rank {
    std::int64_t virtual_step;
    RequestId request;
    std::uint32_t index;
    auto operator<=>(const Rank&) const = default;
  };

  Request& request_of(const Sequence& sequence) { return *requests_.at(sequence.request); }
  const Request& request_of(const Sequence& sequence) const { return *requests_.at(sequence.request); }
  Rank rank(const Sequence& sequence) const;
  std::int64_t blocks_of(std::int64_t tokens) const {
    return (tokens + options_.block_tokens - 1) / options_.block_tokens;
  }
  std::int64_t slots() const;

  void drop_expired(double now_s);
  void yield_to_urgent();
  void grant_running();
  bool grow(Sequence& sequence, std::int64_t tokens);
  void add_drafts(const DraftProposer& propose);
  void add_chunk(Sequence& sequence, std::int64_t tokens);
  void publish_full_blocks(Sequence& sequence);
  void preempt_last();
  void release_idle(Sequence& sequence);
  bool make_room(std::int64_t blocks, const Rank& rank);

  void admit(std::int64_t num_untaken);
  enum class Prefix { kNone, kComing, kExists };
  Prefix sibling_prefix(const Sequence& sequence, const Sequence** sibling) const;
  bool has_room_for(std::int64_t blocks) const;
  bool start(Sequence& sequence, const Sequence* sibling);
  bool start_from_sibling(Sequence& sequence, const Sequence& sibling);
  bool start_from_cache(Sequence& sequence);
  bool start_from_own_blocks(Sequence& sequence);
  void allocate(Sequence& sequence, std::int64_t tokens);
  void begin_running(Sequence& sequence);
  void make_next_sample(Request& request);
  void leave(Sequence& sequence);
  std::vector<DroppedSample> drop(Request& request);

  SchedulerOptions options_;
  BlockCache cache_;
  std::map<RequestId, std::unique_ptr<Request>> requests_;  ///< with samples unfinished
  std::vector<Sequence*> running_;                          ///< by rank
  /// Preempted and resumed ones, and the next fresh sample of each request.
  std::map<Rank, Sequence*> waiting_;
  std::map<Rank, Sequence*> idle_;  ///< hold blocks and do not run: parked, or resumed and waiting
  std::int64_t num_parked_ = 0;
  std::set<std::pair<std::int64_t, RequestId>> expiry_steps_;
  std::set<std::pair<double, RequestId>> expiry_times_;
  StepPlan plan_;
  std::int64_t budget_ = 0;  ///< rows that this step may still get
  std::int64_t generation_ = 0;
  RequestId last_request_ = 0;
  SequenceId last_sequence_ = 0;
  SchedulerStatistics statistics_;
};

}  // namespace rlhf

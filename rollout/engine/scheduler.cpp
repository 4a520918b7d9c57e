#include "rollout/engine/scheduler.h"

#include <algorithm>

#include "rlhf/core/error.h"

namespace rlhf {

struct EngineScheduler::Request {
  RequestId id = 0;
  ScheduledRequest spec;
  std::int64_t submit_step = 0;
  std::uint32_t num_made = 0;                   // samples that have, or had, a sequence
  std::vector<std::unique_ptr<Sequence>> live;  // unfinished; at most one of them has never run
};

EngineScheduler::EngineScheduler(const SchedulerOptions& options)
    : options_(options), cache_(options.num_blocks, options.block_tokens) {
  RLHF_CHECK(options.max_sequences > 0 && options.max_tokens_per_step > 0 && options.num_blocks > 0,
             "rollout: max_sequences, max_tokens_per_step and num_blocks must be positive");
  RLHF_CHECK(options.ageing_steps > 0 && options.max_finished >= 0, "rollout: ageing_steps is ",
             options.ageing_steps, ", expected above 0; max_finished is ", options.max_finished,
             ", expected at least 0");
}

EngineScheduler::~EngineScheduler() = default;

// ---- requests ----

std::int32_t EngineScheduler::blocks_needed(std::int64_t prompt_tokens, std::int64_t max_new_tokens) const {
  // The last token of a response is sampled and never fed.
  return static_cast<std::int32_t>(blocks_of(prompt_tokens + max_new_tokens - 1));
}

RequestId EngineScheduler::submit(ScheduledRequest spec) {
  RLHF_CHECK(!spec.prompt.empty() && spec.num_samples > 0 && spec.max_new_tokens > 0,
             "rollout: a request of ", spec.prompt.size(), " prompt tokens, ", spec.num_samples,
             " samples and at most ", spec.max_new_tokens, " new tokens; all must be positive");
  const std::int32_t needed =
      blocks_needed(static_cast<std::int64_t>(spec.prompt.size()), spec.max_new_tokens);
  RLHF_CHECK(needed <= cache_.limit(), "one sample of ", spec.prompt.size(), " + ", spec.max_new_tokens,
             " tokens needs ", needed, " K/V blocks but the cache has ", cache_.limit(),
             "; raise the rollout memory or lower max_new_tokens");
  auto request = std::make_unique<Request>();
  request->id = ++last_request_;
  request->submit_step = statistics_.steps;
  if (spec.expires_step) expiry_steps_.emplace(*spec.expires_step, request->id);
  if (spec.expires_s) expiry_times_.emplace(*spec.expires_s, request->id);
  request->spec = std::move(spec);
  Request& kept = *requests_.emplace(request->id, std::move(request)).first->second;
  make_next_sample(kept);
  return kept.id;
}

void EngineScheduler::make_next_sample(Request& request) {
  if (request.num_made == request.spec.num_samples) return;
  auto sequence = std::make_unique<Sequence>();
  sequence->id = ++last_sequence_;
  sequence->request = request.id;
  sequence->index = request.num_made++;
  sequence->tokens = request.spec.prompt;
  sequence->prompt_tokens = sequence->length();
  waiting_.emplace(rank(*sequence), sequence.get());
  request.live.push_back(std::move(sequence));
}

EngineScheduler::Rank EngineScheduler::rank(const Sequence& sequence) const {
  const Request& request = request_of(sequence);
  return {request.submit_step - request.spec.priority * options_.ageing_steps, sequence.request,
          sequence.index};
}

const Sequence* EngineScheduler::first_in_rank() const {
  const Sequence* running = running_.empty() ? nullptr : running_.front();
  const Sequence* waiting = waiting_.empty() ? nullptr : waiting_.begin()->second;
  if (!running || !waiting) return running ? running : waiting;
  return rank(*running) < rank(*waiting) ? running : waiting;
}

void EngineScheduler::append(Sequence& sequence, std::span<const TokenId> tokens) {
  RLHF_CHECK(sequence.running() && sequence.uncomputed() == 0, "rollout: sequence ", sequence.id,
             " was not sampled in this step");
  sequence.tokens.insert(sequence.tokens.end(), tokens.begin(), tokens.end());
  if (!options_.keep_kv) sequence.computed = 0;
}

void EngineScheduler::accept_draft(Sequence& sequence) {
  const auto taken = to_size(sequence.planned) - 1;
  RLHF_CHECK(sequence.uncomputed() == 1 && taken < sequence.drafts.size() &&
                 sequence.tokens.back() == sequence.drafts[taken],
             "rollout: sequence ", sequence.id, " has no such draft");
  ++sequence.planned;
  ++sequence.computed;
  sequence.reached = std::max(sequence.reached, sequence.computed);
  publish_full_blocks(sequence);
}

void EngineScheduler::park(Sequence& sequence) {
  RLHF_CHECK(sequence.running() && sequence.uncomputed() == 1, "rollout: sequence ", sequence.id,
             " was not appended to in this step");
  std::erase(running_, &sequence);
  sequence.state = Sequence::State::kParked;
  sequence.planned = 0;
  sequence.drafts.clear();
  idle_.emplace(rank(sequence), &sequence);
  ++num_parked_;
}

void EngineScheduler::resume(Sequence& sequence, std::span<const TokenId> tokens) {
  RLHF_CHECK(sequence.state == Sequence::State::kParked, "rollout: sequence ", sequence.id, " is not parked");
  sequence.tokens.insert(sequence.tokens.end(), tokens.begin(), tokens.end());
  sequence.state = Sequence::State::kWaiting;
  waiting_.emplace(rank(sequence), &sequence);
  --num_parked_;
}

void EngineScheduler::finish(Sequence& sequence) {
  Request& request = request_of(sequence);
  leave(sequence);
  std::erase_if(request.live, [&](const auto& live) { return live.get() == &sequence; });
  if (request.live.empty()) drop(request);  // nothing is left to drop but the request itself
}

std::vector<DroppedSample> EngineScheduler::cancel(RequestId id) {
  const auto request = requests_.find(id);
  return request == requests_.end() ? std::vector<DroppedSample>{} : drop(*request->second);
}

void EngineScheduler::cancel_all() {
  while (!requests_.empty()) drop(*requests_.begin()->second);
}

std::vector<DroppedSample> EngineScheduler::drop(Request& request) {
  std::vector<DroppedSample> dropped;
  for (auto& sequence : request.live) {
    dropped.push_back({request.id, sequence->index, sequence->id});
    leave(*sequence);
  }
  for (std::uint32_t index = request.num_made; index < request.spec.num_samples; ++index)
    dropped.push_back({request.id, index, 0});
  std::ranges::sort(dropped, {}, &DroppedSample::index);
  if (request.spec.expires_step) expiry_steps_.erase({*request.spec.expires_step, request.id});
  if (request.spec.expires_s) expiry_times_.erase({*request.spec.expires_s, request.id});
  const RequestId id = request.id;
  requests_.erase(id);
  return dropped;
}

// Takes a sequence out of wherever it is.
void EngineScheduler::leave(Sequence& sequence) {
  cache_.release(sequence.table);
  sequence.table.clear();
  std::erase(running_, &sequence);
  waiting_.erase(rank(sequence));
  idle_.erase(rank(sequence));
  num_parked_ -= sequence.state == Sequence::State::kParked;
}

std::vector<BlockCache::Move> EngineScheduler::set_block_limit(std::int32_t limit) {
  cache_.set_limit(limit);
  while (cache_.excess() > 0 && !idle_.empty()) release_idle(*idle_.rbegin()->second);
  while (cache_.excess() > 0 && !running_.empty()) preempt_last();
  const auto moves = cache_.compact();
  std::map<std::int32_t, std::int32_t> names;
  for (const auto& [from, to] : moves) names.emplace(from, to);
  if (names.empty()) return moves;
  for (auto& [id, request] : requests_)
    for (auto& sequence : request->live)
      for (std::int32_t& block : sequence->table)
        if (const auto name = names.find(block); name != names.end()) block = name->second;
  return moves;
}

void EngineScheduler::forget_prefixes() {
  cache_.forget_published();
  ++generation_;
}

// ---- one step ----

const StepPlan& EngineScheduler::plan(double now_s, std::int64_t num_untaken, const DraftProposer& propose) {
  plan_ = {};
  budget_ = options_.max_tokens_per_step;
  for (Sequence* sequence : running_) {
    sequence->planned = 0;
    sequence->drafts.clear();
  }
  drop_expired(now_s);
  yield_to_urgent();
  grant_running();
  admit(num_untaken);
  if (propose) add_drafts(propose);
  ++statistics_.steps;
  return plan_;
}

// Guesses take rows and blocks that nobody else wants in this step.
void EngineScheduler::add_drafts(const DraftProposer& propose) {
  const auto decodes = [](const StepPlan::Chunk& chunk) {
    return chunk.samples() && chunk.end - chunk.begin == 1;
  };
  // Who waits for a slot wants neither yet.
  const bool full = static_cast<std::int64_t>(running_.size()) >= options_.max_sequences;
  if ((!waiting_.empty() && !full) || plan_.chunks.size() != running_.size() ||
      !std::ranges::all_of(plan_.chunks, decodes))
    return;
  for (const StepPlan::Chunk& chunk : plan_.chunks) {
    Sequence& sequence = *chunk.sequence;
    const Request& request = request_of(sequence);
    // The last token of a response is sampled and never fed.
    const std::int64_t room = request.spec.max_new_tokens - (sequence.length() - sequence.prompt_tokens) - 1;
    const std::int64_t most = std::min(room, budget_);
    if (most <= 0) continue;
    propose(sequence, most);
    const auto wanted = [&] { return sequence.length() + static_cast<std::int64_t>(sequence.drafts.size()); };
    while (blocks_of(wanted()) > static_cast<std::int64_t>(sequence.table.size())) {
      const auto block = has_room_for(1) ? cache_.try_allocate() : std::nullopt;
      if (block)
        sequence.table.push_back(*block);
      else
        sequence.drafts.resize(sequence.table.size() * to_size(options_.block_tokens) -
                               sequence.tokens.size());
    }
    budget_ -= static_cast<std::int64_t>(sequence.drafts.size());
  }
}

void EngineScheduler::drop_expired(double now_s) {
  const auto drop_first = [&](RequestId id) {
    for (const DroppedSample& sample : cancel(id)) plan_.expired.push_back(sample);
  };
  while (!expiry_steps_.empty() && expiry_steps_.begin()->first <= statistics_.steps)
    drop_first(expiry_steps_.begin()->second);
  while (!expiry_times_.empty() && expiry_times_.begin()->first <= now_s)
    drop_first(expiry_times_.begin()->second);
}

// A waiting sample of higher priority takes the place of running ones of lower priority. Within a priority
// nobody has to leave for a place: that would only trade one wait for another and work done twice.
void EngineScheduler::yield_to_urgent() {
  if (waiting_.empty()) return;
  const auto& [urgent_rank, urgent] = *waiting_.begin();
  const Sequence* sibling = nullptr;
  const std::int64_t needed = blocks_of(urgent->length()) - static_cast<std::int64_t>(urgent->table.size());
  if (blocks_of(urgent->length()) > cache_.limit() || sibling_prefix(*urgent, &sibling) == Prefix::kComing)
    return;
  const int priority = request_of(*urgent).spec.priority;
  while (!running_.empty() && request_of(*running_.back()).spec.priority < priority &&
         urgent_rank < rank(*running_.back()) &&
         (static_cast<std::int64_t>(running_.size()) >= slots() || !make_room(needed, urgent_rank)))
    preempt_last();
}

// Sequences that need one token get it; the first of the others share what is left of the budget. Since there
// are no more running sequences than rows in a step, at least one row is left for them.
void EngineScheduler::grant_running() {
  std::int64_t for_chunks = budget_;
  for (const Sequence* sequence : running_) for_chunks -= sequence->uncomputed() == 1;
  for (std::size_t i = 0; i < running_.size(); ++i) {
    Sequence& sequence = *running_[i];
    const bool decodes = sequence.uncomputed() == 1;
    const std::int64_t tokens = decodes ? 1 : std::min(sequence.uncomputed(), for_chunks);
    if (tokens == 0) continue;
    if (!grow(sequence, sequence.computed + tokens)) return;
    if (!decodes) for_chunks -= tokens;
    add_chunk(sequence, tokens);
  }
}

// Blocks for `tokens` tokens, taken from those that do not run and then from the last in rank if need be.
// False when the sequence was the last itself and had to leave. Called in order of rank, so whoever is
// preempted has nothing planned.
bool EngineScheduler::grow(Sequence& sequence, std::int64_t tokens) {
  while (static_cast<std::int64_t>(sequence.table.size()) < blocks_of(tokens)) {
    if (const auto block = cache_.try_allocate()) {
      sequence.table.push_back(*block);
      continue;
    }
    if (!idle_.empty()) {
      release_idle(*idle_.rbegin()->second);
      continue;
    }
    const bool is_last = running_.back() == &sequence;
    preempt_last();
    if (is_last) return false;
  }
  return true;
}

void EngineScheduler::preempt_last() {
  Sequence& sequence = *running_.back();
  ++statistics_.preemptions;
  leave(sequence);
  sequence.nodes.clear();
  sequence.computed = sequence.planned = 0;
  sequence.state = Sequence::State::kWaiting;
  waiting_.emplace(rank(sequence), &sequence);
}

// A parked or resumed sequence loses its blocks and keeps its place.
void EngineScheduler::release_idle(Sequence& sequence) {
  ++statistics_.preemptions;
  cache_.release(sequence.table);
  sequence.table.clear();
  sequence.nodes.clear();
  sequence.computed = 0;
  idle_.erase(rank(sequence));
}

// Room for an admission of this rank. Who came earlier keeps its blocks while it does not run, unless nothing
// would run at all.
bool EngineScheduler::make_room(std::int64_t blocks, const Rank& rank) {
  while (!has_room_for(blocks) && !idle_.empty() && (running_.empty() || rank < idle_.rbegin()->first))
    release_idle(*idle_.rbegin()->second);
  return has_room_for(blocks);
}

void EngineScheduler::add_chunk(Sequence& sequence, std::int64_t tokens) {
  budget_ -= tokens;
  plan_.chunks.push_back({&sequence, sequence.computed, sequence.computed + tokens});
  sequence.planned = tokens;
  sequence.computed += tokens;
  sequence.reached = std::max(sequence.reached, sequence.computed);
  publish_full_blocks(sequence);
}

// Also blocks that only this step fills: within a layer all K/V are written before any are read, so other
// sequences may share them in the same pass.
void EngineScheduler::publish_full_blocks(Sequence& sequence) {
  if (!options_.share_prefixes) return;
  if (sequence.generation != generation_) return;  // part of its K/V is of older weights
  const std::int64_t width = options_.block_tokens;
  for (auto b = static_cast<std::int64_t>(sequence.nodes.size()); (b + 1) * width <= sequence.computed; ++b) {
    const auto parent = b == 0 ? BlockCache::kRoot : sequence.nodes.back();
    const auto tokens = std::span<const TokenId>(sequence.tokens).subspan(to_size(b * width), to_size(width));
    sequence.nodes.push_back(cache_.publish(sequence.table[to_size(b)], parent, tokens));
  }
}

// ---- admission ----

std::int64_t EngineScheduler::slots() const {
  return std::min<std::int64_t>(options_.max_sequences, options_.max_tokens_per_step);
}

// In order of rank, and nobody passes one who finds no room. Only samples whose prompt another sample is just
// computing are stepped over; they keep their places.
void EngineScheduler::admit(std::int64_t num_untaken) {
  auto reserved = static_cast<std::int64_t>(running_.size());
  for (auto next = waiting_.begin(); next != waiting_.end() && budget_ > 0 && reserved < slots();) {
    const auto [its_rank, sequence] = *next;
    const Sequence* sibling = nullptr;
    const Prefix prefix = sibling_prefix(*sequence, &sibling);
    if (prefix == Prefix::kComing) {
      const Request& request = request_of(*sequence);
      reserved += 1 + request.spec.num_samples - request.num_made;
      ++next;
      continue;
    }
    if (options_.max_finished > 0 && num_untaken + num_running() + num_parked_ >= options_.max_finished)
      return;
    if (!start(*sequence, sibling)) return;
    begin_running(*sequence);
    ++reserved;
    next = waiting_.upper_bound(its_rank);
  }
}

// Whether another sample of the same prompt has computed the prompt up to its last token. That token is fed
// by each sample itself, for the logits.
EngineScheduler::Prefix EngineScheduler::sibling_prefix(const Sequence& sequence,
                                                        const Sequence** sibling) const {
  if (!options_.share_prefixes || sequence.length() > sequence.prompt_tokens) return Prefix::kNone;
  Prefix found = Prefix::kNone;
  for (const auto& other : request_of(sequence).live) {
    if (!other->holds_blocks() || other->generation != generation_) continue;
    found = Prefix::kComing;
    // What it found in the cache may be computed in this very step, too late for a copy of its last block.
    if (other->admitted_step == statistics_.steps) continue;
    if (other->computed - other->planned < other->prompt_tokens - 1) continue;
    *sibling = other.get();
    return Prefix::kExists;
  }
  return found;
}

bool EngineScheduler::start(Sequence& sequence, const Sequence* sibling) {
  if (sequence.holds_blocks()) return start_from_own_blocks(sequence);
  if (!(sibling ? start_from_sibling(sequence, *sibling) : start_from_cache(sequence))) return false;
  sequence.generation = generation_;
  return true;
}

// One block a running sequence is left alone, so that nobody is preempted soon for this admission's sake.
bool EngineScheduler::has_room_for(std::int64_t blocks) const {
  return cache_.num_available() >= blocks + num_running();
}

bool EngineScheduler::start_from_sibling(Sequence& sequence, const Sequence& sibling) {
  const std::int64_t prefix = sequence.prompt_tokens - 1, shared = prefix / options_.block_tokens;
  if (!make_room(blocks_of(sequence.length()) - shared, rank(sequence))) return false;
  if (!sibling.holds_blocks()) return start_from_cache(sequence);  // room was made of the sibling's own
  sequence.table.assign(sibling.table.begin(), sibling.table.begin() + shared);
  sequence.nodes.assign(sibling.nodes.begin(), sibling.nodes.begin() + shared);
  for (std::int32_t block : sequence.table) cache_.add_reference(block);
  allocate(sequence, sequence.length());
  // Copy on write, and the write comes in this very step.
  if (prefix % options_.block_tokens != 0)
    plan_.copies.push_back({sibling.table[to_size(shared)], sequence.table[to_size(shared)]});
  sequence.computed = prefix;
  statistics_.forked_tokens += prefix;
  return true;
}

bool EngineScheduler::start_from_cache(Sequence& sequence) {
  // The last token is always fed: its logits are wanted.
  sequence.table = cache_.match(std::span<const TokenId>(sequence.tokens).first(sequence.tokens.size() - 1));
  const auto shared = static_cast<std::int64_t>(sequence.table.size());
  if (!make_room(blocks_of(sequence.length()) - shared, rank(sequence))) {
    cache_.release(sequence.table);
    sequence.table.clear();
    return false;
  }
  for (std::int32_t block : sequence.table) sequence.nodes.push_back(cache_.node(block));
  allocate(sequence, sequence.length());
  sequence.computed = shared * options_.block_tokens;
  statistics_.cached_prefix_tokens += sequence.computed;
  return true;
}

// What it had before it was parked is still there, also the K/V of a block that is not full.
bool EngineScheduler::start_from_own_blocks(Sequence& sequence) {
  const Rank its_rank = rank(sequence);
  const auto held = static_cast<std::int64_t>(sequence.table.size());
  idle_.erase(its_rank);
  if (make_room(std::max<std::int64_t>(0, blocks_of(sequence.length()) - held), its_rank)) {
    allocate(sequence, sequence.length());
    return true;
  }
  idle_.emplace(its_rank, &sequence);
  return false;
}

void EngineScheduler::allocate(Sequence& sequence, std::int64_t tokens) {
  while (static_cast<std::int64_t>(sequence.table.size()) < blocks_of(tokens))
    sequence.table.push_back(*cache_.try_allocate());
}

void EngineScheduler::begin_running(Sequence& sequence) {
  Request& request = request_of(sequence);
  sequence.state = Sequence::State::kRunning;
  sequence.admitted_step = statistics_.steps;
  const auto later = [&](const Rank& a, const Sequence* b) { return a < rank(*b); };
  running_.insert(std::upper_bound(running_.begin(), running_.end(), rank(sequence), later), &sequence);
  waiting_.erase(rank(sequence));
  statistics_.recomputed_tokens += std::max<std::int64_t>(0, sequence.reached - sequence.computed);
  if (sequence.reached == 0 && sequence.index == 0)
    statistics_.longest_wait_steps =
        std::max(statistics_.longest_wait_steps, statistics_.steps - request.submit_step);
  if (sequence.index + 1 == request.num_made) make_next_sample(request);
  add_chunk(sequence, std::min(sequence.uncomputed(), budget_));
}

bool EngineScheduler::stalled() const {
  return running_.empty() && !waiting_.empty() &&
         blocks_of(waiting_.begin()->second->length()) > cache_.limit();
}

// ---- invariants ----

void EngineScheduler::check() const {
  cache_.check();
  std::vector<std::int32_t> references(to_size(cache_.num_blocks()));
  std::size_t live = 0;
  for (const auto& [id, request] : requests_) live += request->live.size();
  if (live != running_.size() + waiting_.size() + to_size(num_parked_))
    fail<InternalError>("rollout: ", live, " live sequences, ", running_.size(), " running + ",
                        waiting_.size(), " waiting + ", num_parked_, " parked");
  if (num_running() > slots())
    fail<InternalError>("rollout: ", num_running(), " sequences run in ", slots(), " slots");
  for (std::size_t i = 0; i < running_.size(); ++i) {
    const Sequence& s = *running_[i];
    for (std::int32_t block : s.table) ++references[to_size(block)];
    if (!s.running()) fail<InternalError>("rollout: sequence ", s.id, " runs without knowing it");
    if (i > 0 && !(rank(*running_[i - 1]) < rank(s)))
      fail<InternalError>("rollout: sequence ", s.id, " runs out of rank");
    if (s.computed > s.length() || static_cast<std::int64_t>(s.table.size()) < blocks_of(s.computed))
      fail<InternalError>("rollout: sequence ", s.id, " has ", s.table.size(), " blocks for ", s.computed,
                          " of ", s.length(), " tokens");
  }
  for (const auto& [its_rank, sequence] : waiting_) {
    const bool idle = idle_.contains(its_rank);
    if (sequence->state != Sequence::State::kWaiting || its_rank != rank(*sequence) ||
        sequence->holds_blocks() != idle || (sequence->computed != 0) != idle)
      fail<InternalError>("rollout: sequence ", sequence->id, " waits, holds ", sequence->table.size(),
                          " blocks and is ", idle ? "" : "not ", "idle");
  }
  for (const auto& [its_rank, sequence] : idle_) {
    for (std::int32_t block : sequence->table) ++references[to_size(block)];
    if (sequence->running() || !sequence->holds_blocks() || its_rank != rank(*sequence))
      fail<InternalError>("rollout: sequence ", sequence->id, " is idle and runs, or holds no blocks");
  }
  for (std::int32_t b = 0; b < cache_.num_blocks(); ++b)
    if (cache_.references(b) != references[to_size(b)])
      fail<InternalError>("rollout: block ", b, " has ", cache_.references(b), " references, ",
                          references[to_size(b)], " sequences hold it");
}

}  // namespace rlhf

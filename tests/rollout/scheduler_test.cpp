// The scheduler with a model that costs nothing: K/V of a token is a hash of all tokens up to it, so a block
// that is shared, copied, evicted or computed again at the wrong time is seen at once.
#include "rollout/engine/scheduler.h"

#include <algorithm>
#include <functional>
#include <map>
#include <set>

#include "rlhf/core/error.h"
#include "rlhf/core/random.h"
#include "tests/catch.h"

using namespace rlhf;

namespace {

using Tokens = std::vector<TokenId>;
using SampleKey = std::pair<RequestId, std::uint32_t>;

std::uint64_t mix(std::uint64_t hash, std::uint64_t value) {
  hash = (hash ^ value) * 0x9e3779b97f4a7c15ULL;
  return hash ^ (hash >> 29);
}

// The token of a sample at a position: like a draw, a function of the coordinates alone. 0 ends a response.
TokenId token_at(RequestId request, std::uint32_t index, std::int64_t position) {
  return static_cast<TokenId>(mix(mix(mix(1, request), index), static_cast<std::uint64_t>(position)) % 12);
}

// Executes plans and checks that every token a sequence attends to is its own.
class FakeModel {
 public:
  explicit FakeModel(const SchedulerOptions& options)
      : width_(options.block_tokens),
        kv_(static_cast<std::size_t>(options.num_blocks * options.block_tokens)) {}

  void new_weights() { ++version_; }

  // What lies beyond the limit afterwards is somebody else's.
  void move(const std::vector<BlockCache::Move>& moves, std::int32_t limit) {
    for (const auto& [from, to] : moves) copy(from, to);
    std::fill(kv_.begin() + limit * width_, kv_.end(), Kv{});
    num_moves_ += std::ssize(moves);
  }
  std::int64_t num_moves() const { return num_moves_; }

  void run(const StepPlan& plan) {
    for (const auto& [from, to] : plan.copies) copy(from, to);
    for (const auto& chunk : plan.chunks) write(chunk);
    for (const auto& chunk : plan.chunks) read(chunk);
  }

 private:
  struct Kv {
    std::uint64_t hash = 0;
    std::int64_t version = 0;
  };

  void copy(std::int32_t from, std::int32_t to) {
    std::copy_n(kv_.begin() + from * width_, width_, kv_.begin() + to * width_);
  }
  Kv& at(const Sequence& sequence, std::int64_t t) {
    const auto block = sequence.table.at(static_cast<std::size_t>(t / width_));
    return kv_[static_cast<std::size_t>(block * width_ + t % width_)];
  }
  void write(const StepPlan::Chunk& chunk) {
    std::uint64_t hash = 0;
    for (std::int64_t t = 0; t < chunk.end; ++t) {
      hash = mix(hash, static_cast<std::uint64_t>(chunk.sequence->tokens[static_cast<std::size_t>(t)]) + 1);
      if (t >= chunk.begin) at(*chunk.sequence, t) = {hash, version_};
    }
  }
  void read(const StepPlan::Chunk& chunk) {
    std::uint64_t hash = 0;
    bool same = true, fresh = true;
    for (std::int64_t t = 0; t < chunk.end; ++t) {
      hash = mix(hash, static_cast<std::uint64_t>(chunk.sequence->tokens[static_cast<std::size_t>(t)]) + 1);
      same = same && at(*chunk.sequence, t).hash == hash;
      fresh = fresh && at(*chunk.sequence, t).version >= chunk.sequence->generation;
    }
    REQUIRE(same);
    REQUIRE(fresh);  // nothing older than the weights under which the sequence began
  }

  std::int64_t width_, version_ = 0, num_moves_ = 0;
  std::vector<Kv> kv_;
};

SchedulerOptions small_options() {
  SchedulerOptions options;
  options.max_sequences = 6;
  options.max_tokens_per_step = 16;
  options.num_blocks = 24;
  options.block_tokens = 4;
  options.ageing_steps = 20;
  return options;
}

ScheduledRequest make_request(std::size_t prompt_tokens, std::int64_t max_new_tokens, int priority = 0) {
  ScheduledRequest request;
  for (std::size_t i = 0; i < prompt_tokens; ++i) request.prompt.push_back(static_cast<TokenId>(100 + i));
  request.max_new_tokens = max_new_tokens;
  request.priority = priority;
  return request;
}

// Runs a plan with the fake model and ends responses. `goes_on` may park a
// sample that would go on.
// @return the samples that finished
std::vector<SampleKey> execute(EngineScheduler& scheduler, FakeModel& model, const StepPlan& plan,
                               const std::map<RequestId, std::int64_t>& max_new_tokens,
                               const std::function<void(Sequence&)>& goes_on = {}) {
  model.run(plan);
  std::vector<SampleKey> finished;
  for (const auto& chunk : plan.chunks) {
    if (!chunk.samples()) continue;
    Sequence& s = *chunk.sequence;
    const std::int64_t position = s.length() - s.prompt_tokens;
    // The response so far is what was drawn, whatever happened in between.
    bool same = true;
    for (std::int64_t p = 0; p < position; ++p)
      same =
          same && s.tokens[static_cast<std::size_t>(s.prompt_tokens + p)] == token_at(s.request, s.index, p);
    REQUIRE(same);
    const TokenId token = token_at(s.request, s.index, position);
    scheduler.append(s, std::vector<TokenId>{token});
    if (token != 0 && position + 1 < max_new_tokens.at(s.request)) {
      if (goes_on) goes_on(s);
      continue;
    }
    finished.emplace_back(s.request, s.index);
    scheduler.finish(s);
  }
  return finished;
}

// Many requests of every kind against a cache of a few blocks, with all that can happen to them.
class Soak {
 public:
  enum class Turns { kOne, kMany };  // many: samples are parked and resumed at any time
  Soak(std::uint64_t seed, std::int64_t num_requests, Turns turns)
      : random_(seed), num_requests_(num_requests), turns_(turns), scheduler_(options()), model_(options()) {}

  void run() {
    while (num_submitted_ < num_requests_ || scheduler_.busy()) {
      arrive();
      disturb();
      answer_parked();
      step();
      scheduler_.check();
      for (std::uint64_t takes = random_.below(4); takes > 0 && untaken_ > 0; --takes) --untaken_;
    }
    CHECK(expected_.empty());  // every sample came out exactly once
    CHECK(scheduler_.cache().num_available() == scheduler_.cache().limit());
  }

  const EngineScheduler& scheduler() const { return scheduler_; }
  std::int64_t finished() const { return num_finished_; }
  std::int64_t dropped() const { return num_dropped_; }
  std::int64_t longest_pause() const { return longest_pause_; }
  std::int64_t resumed() const { return num_resumed_; }
  std::int64_t moves() const { return model_.num_moves(); }
  std::int64_t kept() const { return num_kept_; }

 private:
  using Rank = std::pair<std::int64_t, RequestId>;

  static SchedulerOptions options() {
    auto options = small_options();
    options.max_finished = 9;
    return options;
  }

  // At most kOpen at a time, so that waiting can be bounded.
  void arrive() {
    while (num_submitted_ < num_requests_ && max_new_tokens_.size() < kOpen && random_.below(3) != 0) {
      ScheduledRequest request;
      const std::uint64_t head = random_.below(4);
      for (std::uint64_t i = 0; i < 4 * head; ++i)
        request.prompt.push_back(static_cast<TokenId>(head + i / 8));
      for (std::uint64_t i = 0, n = 1 + random_.below(8); i < n; ++i)
        request.prompt.push_back(static_cast<TokenId>(random_.below(3)));
      request.num_samples = 1 + static_cast<std::uint32_t>(random_.below(4));
      request.max_new_tokens = 1 + static_cast<std::int64_t>(random_.below(16));
      request.priority = static_cast<int>(random_.below(3)) - 1;
      if (random_.below(12) == 0)
        request.expires_step = scheduler_.step() + static_cast<std::int64_t>(random_.below(40));
      if (random_.below(12) == 0) request.expires_s = time_ + static_cast<double>(random_.below(40));
      const auto longest = request.max_new_tokens;
      const auto samples = request.num_samples;
      const int priority = request.priority;
      if (scheduler_.blocks_needed(static_cast<std::int64_t>(request.prompt.size()), longest) >
          scheduler_.cache().limit())
        return;  // refused until the limit is high again
      const RequestId id = scheduler_.submit(std::move(request));
      ++num_submitted_;
      max_new_tokens_[id] = longest;
      open_samples_[id] = samples;
      not_started_[{scheduler_.step() - priority * options().ageing_steps, id}] = true;
      ranks_[id] = {scheduler_.step() - priority * options().ageing_steps, id};
      for (std::uint32_t i = 0; i < samples; ++i) expected_.insert({id, i});
    }
  }

  void disturb() {
    if (random_.below(60) == 0 && !max_new_tokens_.empty()) {
      auto victim = max_new_tokens_.begin();
      std::advance(victim, static_cast<std::ptrdiff_t>(random_.below(max_new_tokens_.size())));
      const RequestId id = victim->first;
      for (const DroppedSample& sample : scheduler_.cancel(id)) drop(sample);
    }
    if (random_.below(50) == 0) {
      scheduler_.forget_prefixes();
      model_.new_weights();
    }
    if (--limit_steps_ < 0) {  // low limits are short, as when another tenant needs memory for a while
      const bool low = scheduler_.cache().limit() >= kEnough && random_.below(2) == 0;
      const auto blocks = low ? random_.below(kEnough) : kEnough + random_.below(24 - kEnough + 1);
      const auto limit = static_cast<std::int32_t>(blocks);
      model_.move(scheduler_.set_block_limit(limit), limit);
      limit_steps_ = static_cast<std::int64_t>(random_.below(low ? 5 : 60));
    }
  }

  // Environments answer some of those that wait: tokens to go on with, or the end.
  void answer_parked() {
    for (auto next = parked_.begin(); next != parked_.end();) {
      const auto [key, sequence] = *next++;
      if (random_.below(4) != 0) continue;
      parked_.erase(key);
      num_kept_ += sequence->holds_blocks();
      ++num_resumed_;
      const std::int64_t position = sequence->length() - sequence->prompt_tokens;
      const std::int64_t room = max_new_tokens_.at(key.first) - position - 1;
      Tokens tokens;
      for (auto i = static_cast<std::int64_t>(random_.below(7)); i > 0 && room > std::ssize(tokens); --i)
        tokens.push_back(token_at(key.first, key.second, position + std::ssize(tokens)));
      if (random_.below(5) != 0) {
        scheduler_.resume(*sequence, tokens);
        continue;
      }
      scheduler_.finish(*sequence);
      ++num_finished_;
      ++untaken_;
      end(key);
    }
  }

  void step() {
    time_ += 0.5;
    const Sequence* first = scheduler_.first_in_rank();
    const SequenceId first_id = first ? first->id : 0;
    const bool first_runs = first && first->running();
    const StepPlan& plan = scheduler_.plan(time_, untaken_);
    for (const DroppedSample& sample : plan.expired) drop(sample);
    check_plan(plan);
    // The first in rank goes on in every step, unless its blocks are taken away altogether.
    if (first_runs && plan.expired.empty() && scheduler_.cache().limit() >= kEnough)
      REQUIRE(std::ranges::any_of(plan.chunks, [&](const auto& c) { return c.sequence->id == first_id; }));
    const bool held_up =
        scheduler_.cache().limit() < kEnough || untaken_ + scheduler_.num_parked() >= options().max_finished;
    if (scheduler_.first_in_rank() && !held_up) REQUIRE_FALSE(plan.chunks.empty());
    pause_ = plan.chunks.empty() ? pause_ + 1 : 0;
    longest_pause_ = std::max(longest_pause_, pause_);
    const auto maybe_park = [&](Sequence& sequence) {
      if (turns_ == Turns::kOne || random_.below(5) != 0) return;
      scheduler_.park(sequence);
      parked_[{sequence.request, sequence.index}] = &sequence;
    };
    for (const SampleKey& sample : execute(scheduler_, model_, plan, max_new_tokens_, maybe_park)) {
      ++num_finished_;
      ++untaken_;
      end(sample);
    }
    REQUIRE(untaken_ <= options().max_finished);
  }

  void check_plan(const StepPlan& plan) {
    std::int64_t rows = 0;
    std::set<const Sequence*> seen;
    for (const auto& chunk : plan.chunks) {
      rows += chunk.end - chunk.begin;
      REQUIRE(chunk.end > chunk.begin);
      REQUIRE(seen.insert(chunk.sequence).second);
      // Requests begin in order of rank: nobody is overtaken.
      const auto started = not_started_.find(ranks_.at(chunk.sequence->request));
      if (started == not_started_.end()) continue;
      REQUIRE(started == not_started_.begin());
      not_started_.erase(started);
    }
    REQUIRE(rows <= options().max_tokens_per_step);
  }

  void drop(const DroppedSample& sample) {
    ++num_dropped_;
    not_started_.erase(ranks_.at(sample.request));
    parked_.erase({sample.request, sample.index});
    end({sample.request, sample.index});
  }

  void end(const SampleKey& sample) {
    REQUIRE(expected_.erase(sample) == 1);
    if (--open_samples_.at(sample.first) > 0) return;
    open_samples_.erase(sample.first);
    max_new_tokens_.erase(sample.first);
    ranks_.erase(sample.first);
  }

  static constexpr std::size_t kOpen = 12;
  static constexpr std::int32_t kEnough = 9;  // blocks of the longest sample: 12 + 8 + 16 tokens

  RandomStream random_;
  std::int64_t num_requests_;
  Turns turns_;
  std::int64_t num_resumed_ = 0, num_kept_ = 0, num_submitted_ = 0, num_finished_ = 0, num_dropped_ = 0,
               untaken_ = 0;
  std::int64_t limit_steps_ = 0, pause_ = 0, longest_pause_ = 0;
  double time_ = 0;
  EngineScheduler scheduler_;
  FakeModel model_;
  std::map<RequestId, std::int64_t> max_new_tokens_;
  std::map<RequestId, std::uint32_t> open_samples_;
  std::map<RequestId, Rank> ranks_;
  std::map<Rank, bool> not_started_;
  std::set<SampleKey> expected_;
  std::map<SampleKey, Sequence*> parked_;
};

}  // namespace

TEST_CASE(
    "100000 random requests: no leak, no loss, nobody starves, every K/V read is right (seeds 1 to 4)") {
  for (std::uint64_t seed = 1; seed <= 4; ++seed) {
    INFO("seed " << seed);
    Soak soak(seed, 25000, Soak::Turns::kOne);
    soak.run();
    const auto& statistics = soak.scheduler().statistics();
    // The walk has been where it hurts.
    CHECK(soak.finished() > 40000);
    CHECK(soak.dropped() > 2000);
    CHECK(statistics.preemptions > 1000);
    CHECK(statistics.recomputed_tokens > 1000);
    CHECK(statistics.cached_prefix_tokens > 10000);
    CHECK(statistics.forked_tokens > 10000);
    CHECK(soak.scheduler().cache().num_evictions() > 1000);
    CHECK(soak.moves() > 100);
    // All that can be ahead of a request: those that were open, and those that came in the time in which a
    // priority of 1 overtakes one of -1. Alone, each would need its longest response and a step for its
    // prompt.
    CHECK(statistics.longest_wait_steps < 2 * 20 + 12 * 4 * (16 + 2));
    CHECK(soak.longest_pause() < 40);
  }
}

TEST_CASE("40000 requests whose samples are parked and resumed: no leak, no loss, every K/V read is right") {
  for (std::uint64_t seed = 11; seed <= 12; ++seed) {
    INFO("seed " << seed);
    Soak soak(seed, 20000, Soak::Turns::kMany);
    soak.run();
    CHECK(soak.finished() > 30000);
    CHECK(soak.resumed() > 20000);
    CHECK(soak.kept() > soak.resumed() / 2);
    CHECK(soak.kept() < soak.resumed());  // some had to give their blocks to others
    CHECK(soak.scheduler().statistics().preemptions > 1000);
    CHECK(soak.scheduler().statistics().recomputed_tokens > 1000);
    CHECK(soak.scheduler().num_parked() == 0);
  }
}

TEST_CASE("a parked sample keeps its blocks: only what the environment said is computed") {
  const auto options = small_options();
  EngineScheduler scheduler(options);
  FakeModel model(options);
  const RequestId id = scheduler.submit(make_request(6, 20));
  Sequence* parked = nullptr;
  std::vector<std::pair<std::int64_t, std::int64_t>> chunks;
  const auto step = [&](bool park) {
    const StepPlan plan = scheduler.plan(0, 0);
    for (const auto& chunk : plan.chunks) chunks.emplace_back(chunk.begin, chunk.end);
    model.run(plan);
    for (const auto& chunk : plan.chunks) {
      scheduler.append(*chunk.sequence, Tokens{50});
      if (park) scheduler.park(*(parked = chunk.sequence));
    }
    scheduler.check();
  };
  step(false);
  step(true);  // 8 tokens, 7 of them computed
  for (int i = 0; i < 5; ++i) step(false);
  CHECK(chunks == std::vector<std::pair<std::int64_t, std::int64_t>>{{0, 6}, {6, 7}});
  CHECK(scheduler.busy());
  CHECK(scheduler.num_running() == 0);
  CHECK(parked->table.size() == 2);
  scheduler.resume(*parked, Tokens{60, 61, 62});
  chunks.clear();
  step(false);
  CHECK(chunks == std::vector<std::pair<std::int64_t, std::int64_t>>{{7, 11}});
  CHECK(scheduler.statistics().recomputed_tokens == 0);
  CHECK(scheduler.cancel(id).size() == 1);
  scheduler.check();
  CHECK(scheduler.cache().num_available() == scheduler.cache().limit());
}

TEST_CASE("a running sample takes the blocks of a parked one, a later admission does not") {
  auto options = small_options();
  options.num_blocks = 6;
  EngineScheduler scheduler(options);
  FakeModel model(options);
  const auto run_step = [&](RequestId park) {
    const StepPlan plan = scheduler.plan(0, 0);
    model.run(plan);
    Sequence* parked = nullptr;
    for (const auto& chunk : plan.chunks) {
      if (!chunk.samples()) continue;
      scheduler.append(*chunk.sequence, Tokens{50});
      if (chunk.sequence->request == park) scheduler.park(*(parked = chunk.sequence));
    }
    scheduler.check();
    return std::pair(plan.chunks.size(), parked);
  };
  const auto submit = [&](TokenId head, std::size_t prompt_tokens, std::int64_t max_new_tokens) {
    auto request = make_request(prompt_tokens, max_new_tokens);
    request.prompt.front() = head;  // nothing is shared
    return scheduler.submit(request);
  };
  const RequestId first = submit(1, 7, 10), second = submit(2, 5, 10);  // two blocks each
  const auto [chunks, parked] = run_step(first);
  REQUIRE(chunks == 2);
  CHECK(scheduler.cache().num_available() == 2);
  const RequestId third = submit(3, 17, 2);  // five blocks
  for (int i = 0; i < 3; ++i) {
    CHECK(run_step(0).first == 1);  // `second` alone
    CHECK(parked->holds_blocks());
  }
  // Without anybody running the third may take them after all.
  scheduler.cancel(second);
  CHECK(run_step(0).first == 1);
  CHECK_FALSE(parked->holds_blocks());
  scheduler.cancel(third);
  scheduler.resume(*parked, Tokens{});
  CHECK(run_step(0).first == 1);  // what was published of it is still there
  CHECK(scheduler.statistics().recomputed_tokens < 7);
}

TEST_CASE("samples of a prompt, and prompts with a common head, share blocks in the same step") {
  const auto options = small_options();
  EngineScheduler scheduler(options);
  FakeModel model(options);
  auto request = make_request(11, 4);  // two full blocks, two tokens, and the last one
  request.num_samples = 3;
  auto other = make_request(9, 4);  // the same two blocks, then its last token
  scheduler.submit(request);
  scheduler.submit(other);
  const StepPlan first = scheduler.plan(0, 0);
  model.run(first);
  // Sample 0 computes the prompt; the others of its request wait; the second request shares what is computed.
  REQUIRE(first.chunks.size() == 2);
  CHECK(first.chunks[0].begin == 0);
  CHECK(first.chunks[0].end == 11);
  CHECK(first.chunks[1].begin == 8);
  CHECK(first.chunks[1].end == 9);
  CHECK(first.chunks[1].sequence->table[1] == first.chunks[0].sequence->table[1]);
  const auto shared = first.chunks[0].sequence->table;
  for (const auto& chunk : first.chunks) scheduler.append(*chunk.sequence, Tokens{7});
  const StepPlan second = scheduler.plan(0, 0);
  // Now samples 1 and 2 fork: they share the full blocks and copy the third.
  REQUIRE(second.copies.size() == 2);
  CHECK(second.copies[0].from == shared[2]);
  CHECK(scheduler.cache().references(shared[0]) == 4);
  CHECK(scheduler.cache().references(shared[2]) == 1);
  model.run(second);
  scheduler.check();
  CHECK(scheduler.statistics().forked_tokens == 20);
  CHECK(scheduler.statistics().cached_prefix_tokens == 8);
}

TEST_CASE("a higher priority goes first, and takes the place of a lower one that runs") {
  auto options = small_options();
  options.max_sequences = 1;
  EngineScheduler scheduler(options);
  FakeModel model(options);
  std::map<RequestId, std::int64_t> longest;
  std::vector<RequestId> order;
  const auto submit = [&](int priority) {
    const RequestId id = scheduler.submit(make_request(3, 6, priority));
    longest[id] = 6;
    return id;
  };
  const auto low = submit(0), middle = submit(1);
  const auto step = [&] {
    for (const auto& sample : execute(scheduler, model, scheduler.plan(0, 0), longest))
      order.push_back(sample.first);
    scheduler.check();
  };
  step();
  const auto high = submit(2);
  while (scheduler.busy()) step();
  CHECK(order == std::vector<RequestId>{high, middle, low});
  CHECK(scheduler.statistics().preemptions == 1);
}

TEST_CASE(
    "waiting makes up for priority: no stream of urgent requests starves another (bounded overtaking)") {
  auto options = small_options();
  options.max_sequences = 1;
  EngineScheduler scheduler(options);
  FakeModel model(options);
  std::map<RequestId, std::int64_t> longest;
  const RequestId patient = scheduler.submit(make_request(3, 2, 0));
  longest[patient] = 2;
  std::int64_t overtaken = 0;
  for (bool done = false; !done;) {
    REQUIRE(scheduler.step() < 100);
    longest[scheduler.submit(make_request(3, 2, 1))] = 2;  // more than there is time for
    for (const auto& sample : execute(scheduler, model, scheduler.plan(0, 0), longest)) {
      done = done || sample.first == patient;
      overtaken += sample.first != patient;
    }
  }
  // One level is worth 20 steps: only what came before step 20 went first.
  CHECK(overtaken >= 10);
  CHECK(overtaken <= 20);
}

TEST_CASE("deadlines, cancellation and a bounded queue") {
  auto options = small_options();
  options.max_finished = 2;
  EngineScheduler scheduler(options);
  FakeModel model(options);
  std::map<RequestId, std::int64_t> longest;
  SECTION("a request is dropped when its step or its time has come, started or not") {
    auto by_step = make_request(3, 9), by_time = make_request(3, 9);
    by_step.num_samples = 3;
    by_step.expires_step = 2;
    by_time.expires_s = 1.5;
    const auto a = scheduler.submit(by_step), b = scheduler.submit(by_time);
    longest = {{a, 100}, {b, 100}};
    model.run(scheduler.plan(0, 0));
    CHECK(scheduler.num_running() == 2);
    scheduler.cancel(99);
    const StepPlan plan = scheduler.plan(1.5, 0);
    REQUIRE(plan.expired.size() == 1);
    CHECK(plan.expired[0].request == b);
    const StepPlan last = scheduler.plan(1.6, 0);
    REQUIRE(last.expired.size() == 3);
    CHECK(last.expired[0].sequence != 0);
    CHECK(last.expired[2].index == 2);
    CHECK_FALSE(scheduler.busy());
  }
  SECTION("nothing is admitted while samples wait to be taken") {
    for (int i = 0; i < 4; ++i) longest[scheduler.submit(make_request(3, 1))] = 1;
    std::int64_t untaken = 0;
    for (int i = 0; i < 5; ++i)
      untaken +=
          static_cast<std::int64_t>(execute(scheduler, model, scheduler.plan(0, untaken), longest).size());
    CHECK(untaken == 2);
    CHECK_FALSE(scheduler.stalled());  // the caller, not memory
    untaken = 0;
    CHECK(execute(scheduler, model, scheduler.plan(0, untaken), longest).size() == 2);
  }
  scheduler.check();
}

TEST_CASE("a lower block limit preempts the last in rank first; a limit too low is told") {
  const auto options = small_options();
  EngineScheduler scheduler(options);
  FakeModel model(options);
  std::map<RequestId, std::int64_t> longest;
  std::vector<RequestId> ids;
  for (int i = 0; i < 3; ++i) {
    ids.push_back(scheduler.submit(make_request(static_cast<std::size_t>(5 + i), 40)));
    longest[ids.back()] = 40;
  }
  // Ends of responses come from token_at; one step is enough to have all run.
  model.run(scheduler.plan(0, 0));
  REQUIRE(scheduler.num_running() == 3);
  model.move(scheduler.set_block_limit(2), 2);
  for (std::int32_t block = 2; block < 24; ++block) CHECK(scheduler.cache().references(block) == 0);
  CHECK(scheduler.first_in_rank()->request == ids[0]);
  scheduler.plan(0, 0);
  CHECK(scheduler.num_running() == 1);
  CHECK(scheduler.first_in_rank()->running());
  CHECK_FALSE(scheduler.stalled());
  scheduler.set_block_limit(1);
  CHECK(scheduler.plan(0, 0).chunks.empty());
  CHECK(scheduler.stalled());
  CHECK(scheduler.cache().num_available() == 1);
  scheduler.check();
  scheduler.set_block_limit(24);
  CHECK_FALSE(scheduler.stalled());
  CHECK(scheduler.plan(0, 0).chunks.size() == 3);
  scheduler.check();
  CHECK_THROWS_WITH(scheduler.set_block_limit(25), "BlockCache: a limit of 25 blocks, expected 0 to 24");
}

TEST_CASE("requests and options that cannot work are refused") {
  auto options = small_options();
  EngineScheduler scheduler(options);
  CHECK_THROWS_WITH(scheduler.submit(make_request(0, 1)), ContainsSubstring("0 prompt tokens"));
  CHECK_THROWS_WITH(scheduler.submit(make_request(50, 48)),
                    ContainsSubstring("50 + 48 tokens needs 25 K/V blocks but the cache has 24"));
  scheduler.submit(make_request(50, 47));  // the last token needs no K/V
  options.max_tokens_per_step = 0;
  CHECK_THROWS_WITH(EngineScheduler(options), ContainsSubstring("must be positive"));
  options = small_options();
  options.ageing_steps = 0;
  CHECK_THROWS_WITH(EngineScheduler(options), ContainsSubstring("ageing_steps is 0, expected above 0"));
}

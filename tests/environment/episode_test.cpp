// Episodes on the engine: beside each other as alone, what is masked, what is computed, and how they end.
#include "rollout/environment/episode_runner.h"

#include <atomic>
#include <chrono>
#include <future>
#include <set>
#include <stdexcept>
#include <thread>

#include "rlhf/core/error.h"
#include "tests/rollout/support.h"

using namespace rlhf;

namespace {

using Tokens = std::vector<TokenId>;
using Answer = std::function<Observation(const AssistantTurn& turn, const EpisodeStart& start)>;

class FunctionEnvironment : public Environment {
 public:
  FunctionEnvironment(Answer answer, const EpisodeStart& start) : answer_(std::move(answer)), start_(start) {}
  Observation observe(const AssistantTurn& turn) override { return answer_(turn, start_); }

 private:
  Answer answer_;
  EpisodeStart start_;
};

enum class Thread { kEngine, kWorker };

class FunctionFactory : public EnvironmentFactory {
 public:
  FunctionFactory(Thread thread, Answer answer) : thread_(thread), answer_(std::move(answer)) {}
  std::unique_ptr<Environment> begin(const EpisodeStart& start) const override {
    return std::make_unique<FunctionEnvironment>(answer_, start);
  }
  bool answers_at_once() const override { return thread_ == Thread::kEngine; }

 private:
  Thread thread_;
  Answer answer_;
};

std::shared_ptr<EpisodeRunner> make_runner(Thread thread, Answer answer, EpisodeRunnerOptions options = {}) {
  return std::make_shared<EpisodeRunner>(
      std::make_shared<FunctionFactory>(thread, std::move(answer)),
      [](const Observation& observation, TokenId) { return observation.tokens; }, options);
}

// A function of the episode alone: some tokens, sometimes none, sometimes the end.
Observation pseudo_random_answer(const AssistantTurn& turn, const EpisodeStart& start) {
  std::uint64_t hash = start.prompt.id * 1000 + start.sample_index;
  for (TokenId token : turn.tokens)
    hash = (hash ^ static_cast<std::uint64_t>(token)) * 0x9e3779b97f4a7c15ULL + 1;
  RandomStream random(hash);
  Observation observation;
  observation.over = random.below(5) == 0;
  observation.reward = static_cast<double>(random.below(100)) / 8;
  observation.tool_calls = 1;
  if (!observation.over)
    for (std::uint64_t i = random.below(20); i > 0; --i)
      observation.tokens.push_back(static_cast<TokenId>(random.below(256)));
  return observation;
}

// One token in eight ends a turn.
GenerationRequest episode_request(const EpisodeRunner& runner, PromptId id, std::size_t prompt_tokens = 0) {
  auto request = make_request(id, prompt_tokens > 0 ? prompt_tokens : 1 + (id * 7) % 30, 60);
  for (TokenId token = 0; token < 256; token += 8) request.stop.tokens.push_back(token);
  Prompt prompt;
  prompt.id = id;
  request.turns = runner.handler(prompt);
  return request;
}

std::vector<GenerationRequest> many_requests(const EpisodeRunner& runner) {
  std::vector<GenerationRequest> requests;
  for (PromptId id = 0; id < 12; ++id) {
    requests.push_back(episode_request(runner, id));
    requests.back().num_samples = 1 + static_cast<std::uint32_t>(id % 4);
  }
  return requests;
}

// To the end, for environments that may take their time.
std::map<Key, Sample> run_episodes(RolloutEngine& engine, const LanguageModel& model,
                                   const std::vector<GenerationRequest>& requests) {
  std::map<Key, Sample> samples;
  for (const GenerationRequest& request : requests) engine.submit(request);
  while (engine.busy()) {
    engine.step(model.parameters().weights(), 0);
    engine.scheduler().check();
    while (auto sample = engine.try_take()) {
      const Key key{sample->prompt_id, sample->sample_index};
      REQUIRE(samples.emplace(key, std::move(*sample)).second);
    }
  }
  CHECK(engine.cache().num_available() == engine.cache().num_blocks());
  return samples;
}

void check_same_episode(const Sample& a, const Sample& b) {
  check_equal(a, b);
  CHECK(a.answer_begin == b.answer_begin);
  REQUIRE(a.turns.size() == b.turns.size());
  for (std::size_t i = 0; i < a.turns.size(); ++i) {
    CHECK(a.turns[i].end == b.turns[i].end);
    CHECK(a.turns[i].reward == b.turns[i].reward);
  }
}

}  // namespace

TEST_CASE("an episode is what turns of greedy decoding and the environment's words make of it") {
  Setup setup;
  const auto runner = make_runner(Thread::kEngine, pseudo_random_answer);
  std::size_t turns = 0;
  for (PromptId id = 0; id < 20; ++id) {
    auto request = greedy(episode_request(*runner, id, 10));
    // The oracle: full forward passes, one turn after the other.
    const std::set<TokenId> stops(request.stop.tokens.begin(), request.stop.tokens.end());
    Prompt prompt;
    prompt.id = id;
    Tokens expected, turn;
    std::vector<std::uint8_t> mask;
    std::vector<SampleTurn> rewards;
    FinishReason reason = FinishReason::kLength;
    std::size_t answer_begin = 0;
    while (expected.size() < 60) {
      Tokens context = request.prompt;
      context.insert(context.end(), expected.begin(), expected.end());
      expected.push_back(setup.greedy_continuation(context, 1).front());
      turn.push_back(expected.back());
      mask.push_back(1);
      if (!stops.contains(expected.back())) continue;
      const Observation said = pseudo_random_answer({.text = "", .tokens = turn, .limit = {}}, {prompt, 0});
      rewards.push_back({std::ssize(expected), said.reward, 1, 0, 0});
      if (said.over) reason = FinishReason::kStop;
      if (said.over || expected.size() + said.tokens.size() >= 60) break;
      expected.insert(expected.end(), said.tokens.begin(), said.tokens.end());
      mask.resize(expected.size(), 0);
      if (!said.tokens.empty()) answer_begin = expected.size();
      turn.clear();
    }
    const Sample sample = run(*setup.engine({}), setup.model, {request}).at({id, 0});
    INFO("prompt " << id);
    CHECK(sample.tokens == expected);
    CHECK(sample.mask == mask);
    CHECK(sample.finish_reason == reason);
    CHECK(sample.answer_begin == answer_begin);
    REQUIRE(sample.turns.size() == rewards.size());
    for (std::size_t i = 0; i < rewards.size(); ++i) {
      CHECK(sample.turns[i].end == rewards[i].end);
      CHECK(sample.turns[i].reward == rewards[i].reward);
      CHECK(sample.turns[i].tool_calls == 1);
    }
    for (std::size_t t = 0; t < mask.size(); ++t) CHECK((mask[t] == 1 || sample.logprobs[t] == 0));
    turns += rewards.size();
  }
  CHECK(turns > 20);
}

TEST_CASE("episodes that run beside each other are those that run alone, whoever is late") {
  Setup setup;
  const auto direct = make_runner(Thread::kEngine, pseudo_random_answer);
  std::map<Key, Sample> alone;
  for (const GenerationRequest& request : many_requests(*direct))
    for (std::uint32_t i = 0; i < request.num_samples; ++i) {
      GenerationRequest one = request;
      one.num_samples = 1;
      one.first_sample_index = i;
      alone.merge(run_episodes(*setup.engine({}), setup.model, {one}));
    }
  std::size_t turns = 0;
  for (const auto& [key, sample] : alone) turns += sample.turns.size();
  REQUIRE(turns > 2 * alone.size());

  std::atomic<std::uint64_t> calls = 0;
  const auto dawdling = [&](const AssistantTurn& turn, const EpisodeStart& start) {
    const std::uint64_t call = ++calls;
    std::this_thread::sleep_for(std::chrono::microseconds(RandomStream(call).below(4000)));
    return pseudo_random_answer(turn, start);
  };
  struct Case {
    Thread thread;
    int workers;
    std::int64_t max_sequences, max_tokens_per_step, num_blocks, draft_rows;
  };
  for (const Case& c : {Case{Thread::kEngine, 1, 40, 512, 300, 0}, Case{Thread::kWorker, 1, 40, 512, 300, 0},
                        Case{Thread::kWorker, 4, 3, 64, 300, 0}, Case{Thread::kWorker, 4, 8, 16, 13, 0},
                        Case{Thread::kWorker, 3, 40, 64, 300, 32}}) {
    INFO("workers " << c.workers << ", max_sequences " << c.max_sequences << ", blocks " << c.num_blocks);
    EpisodeRunnerOptions options;
    options.workers = c.workers;
    const auto runner = make_runner(
        c.thread, c.thread == Thread::kWorker ? Answer(dawdling) : Answer(pseudo_random_answer), options);
    RolloutEngineOptions engine_options;
    engine_options.max_sequences = c.max_sequences;
    engine_options.max_tokens_per_step = c.max_tokens_per_step;
    engine_options.num_blocks = c.num_blocks;
    engine_options.max_draft_rows = c.draft_rows;
    const auto engine = setup.engine(engine_options);
    const auto together = run_episodes(*engine, setup.model, many_requests(*runner));
    REQUIRE(together.size() == alone.size());
    for (const auto& [key, sample] : together) check_same_episode(sample, alone.at(key));
    if (c.num_blocks < 20) CHECK(engine->statistics().preemptions > 0);
  }
}

TEST_CASE("across turns no K/V is computed twice, also under new weights") {
  Setup setup;
  const auto answer = [](const AssistantTurn& turn, const EpisodeStart&) {
    Observation observation;
    observation.over = turn.number == 4;
    if (!observation.over) observation.tokens = {1, 2, 3, 4, 5};
    return observation;
  };
  for (const Thread thread : {Thread::kEngine, Thread::kWorker}) {
    const auto runner = make_runner(thread, answer);
    auto request = episode_request(*runner, 3, 21);
    request.stop.max_new_tokens = 75;
    for (TokenId token = 1; token < 256; ++token)
      if (token % 8 < 3) request.stop.tokens.push_back(token);
    const auto engine = setup.engine({});
    engine->submit(request);
    WeightVersion version = 0;
    while (engine->busy()) {
      engine->step(setup.model.parameters().weights(), version++);
      engine->forget_prefixes();
    }
    const Sample sample = *engine->try_take();
    REQUIRE(sample.turns.size() == 4);
    CHECK(sample.finish_reason == FinishReason::kStop);
    const auto policy = std::ranges::count(sample.mask, 1);
    CHECK(std::ssize(sample.tokens) - policy == 15);
    const GenerationStatistics statistics = engine->statistics();
    CHECK(statistics.decode_tokens == policy);
    CHECK(statistics.prefill_tokens == 20 + 15);  // the prompt but its last token, and the observations
    CHECK(statistics.recomputed_tokens == 0);
    CHECK(statistics.preemptions == 0);
    CHECK(std::ranges::is_sorted(sample.weight_versions));
    CHECK(sample.weight_versions.size() == sample.tokens.size());
  }
}

TEST_CASE("episodes carry the states behind the first layers of all their tokens") {
  Setup setup;
  const auto runner = make_runner(Thread::kWorker, pseudo_random_answer);
  RolloutEngineOptions options;
  options.trunk_layers = 1;
  options.num_blocks = 1024;  // a sample that loses its blocks has no states to hand out
  const auto engine = setup.engine(options);
  const auto requests = many_requests(*runner);
  SequencePass<float> pass(setup.model.config(), Compute<float>(setup.pool, kernels::detect_cpu_isa()));
  for (const auto& [key, sample] : run_episodes(*engine, setup.model, requests)) {
    auto tokens = requests[key.first].prompt;
    tokens.insert(tokens.end(), sample.tokens.begin(), sample.tokens.end() - 1);
    REQUIRE(sample.trunk.size() == tokens.size() * 24);
    const PackedRows rows({tokens});
    pass.run_trunk(setup.model.parameters().weights(), rows, 1);
    CHECK(std::equal(sample.trunk.begin(), sample.trunk.end(), pass.trunk()));
  }
}

TEST_CASE("turns are limited") {
  Setup setup;
  const auto endless = [](const AssistantTurn&, const EpisodeStart&) {
    Observation observation;
    observation.tokens = {1};
    observation.reward = 0.5;
    return observation;
  };
  for (const std::int64_t max_turns : {1, 2, 3}) {
    EpisodeRunnerOptions options;
    options.limits.max_turns = max_turns;
    const auto runner = make_runner(Thread::kEngine, endless, options);
    auto request = episode_request(*runner, 3, 21);
    for (TokenId token = 1; token < 256; ++token)
      if (token % 8 < 3) request.stop.tokens.push_back(token);
    const Sample sample = run(*setup.engine({}), setup.model, {request}).at({3, 0});
    CHECK(sample.finish_reason == FinishReason::kTurns);
    CHECK(std::ssize(sample.turns) == max_turns);
    CHECK(sample.turns.back().end == std::ssize(sample.tokens));
    CHECK(sample.mask.back() == 1);
  }
}

TEST_CASE("tokens are limited by the request and by the context, observations included") {
  Setup setup;
  const auto long_winded = [](const AssistantTurn&, const EpisodeStart&) {
    Observation observation;
    observation.tokens = Tokens(30, 9);
    return observation;
  };
  const auto runner = make_runner(Thread::kEngine, long_winded);
  auto request = episode_request(*runner, 3, 20);
  for (TokenId token = 0; token < 259; ++token) request.stop.tokens.push_back(token);  // one token a turn
  request.stop.max_new_tokens = 63;
  const Sample limited = run(*setup.engine({}), setup.model, {request}).at({3, 0});
  CHECK(limited.finish_reason == FinishReason::kLength);
  CHECK(limited.tokens.size() == 63);  // 1 + 30 + 1 + 30 + 1
  request.stop.max_new_tokens = 1000;  // the context of 96 has room for 76
  const Sample full = run(*setup.engine({}), setup.model, {request}).at({3, 0});
  CHECK(full.finish_reason == FinishReason::kLength);
  CHECK(full.tokens.size() == 63);
}

TEST_CASE("an episode's time is limited, and others have theirs") {
  Setup setup;
  std::atomic<double> now_s = 0;
  const Clock clock = [&] { return now_s.load(); };
  EpisodeRunnerOptions options;
  options.clock = clock;
  options.limits.max_seconds = 100;
  options.limits.max_reply_seconds = 1000;
  std::promise<void> release;
  const std::shared_future<void> released = release.get_future().share();
  const auto answer = [&](const AssistantTurn& turn, const EpisodeStart& start) {
    if (start.prompt.id == 1) released.wait();  // until long after its time
    return pseudo_random_answer(turn, start);
  };
  options.workers = 2;
  const auto runner = make_runner(Thread::kWorker, answer, options);
  RolloutEngineOptions engine_options;
  engine_options.clock = clock;
  const auto engine = setup.engine(engine_options);
  const auto slow = episode_request(*runner, 1), other = episode_request(*runner, 2);
  const Sample expected = run_episodes(*setup.engine({}), setup.model, {other}).at({2, 0});
  engine->submit(slow);
  engine->submit(other);
  std::map<Key, Sample> samples;
  while (engine->busy()) {
    engine->step(setup.model.parameters().weights(), 0);
    while (auto sample = engine->try_take()) samples.emplace(Key{sample->prompt_id, 0}, std::move(*sample));
    if (samples.size() == 1 && engine->scheduler().num_parked() == 1) now_s = 101;
  }
  check_same_episode(samples.at({2, 0}), expected);
  CHECK(samples.at({1, 0}).finish_reason == FinishReason::kDeadline);
  CHECK(samples.at({1, 0}).turns.empty());
  CHECK_FALSE(samples.at({1, 0}).tokens.empty());
  release.set_value();
}

TEST_CASE("an environment that does not come back ends its own episode") {
  Setup setup;
  std::atomic<double> now_s = 0;
  EpisodeRunnerOptions options;
  options.clock = [&] { return now_s.load(); };
  options.limits.max_reply_seconds = 5;
  options.workers = 1;
  std::promise<void> release;
  const std::shared_future<void> released = release.get_future().share();
  std::atomic<bool> inside = false, was_abandoned = false;
  std::atomic<double> seconds_left = 0;
  const auto runner = make_runner(
      Thread::kWorker,
      [&](const AssistantTurn& turn, const EpisodeStart&) {
        seconds_left = turn.limit.seconds_left();
        inside = true;
        released.wait();
        was_abandoned = turn.limit.is_abandoned();
        return Observation();
      },
      options);
  RolloutEngineOptions engine_options;
  engine_options.clock = options.clock;
  const auto engine = setup.engine(engine_options);
  engine->submit(episode_request(*runner, 1));
  const auto step = [&] { engine->step(setup.model.parameters().weights(), 0); };
  while (!inside) step();
  now_s = 5.5;  // late, but perhaps on its way
  step();
  CHECK(engine->busy());
  now_s = 6.5;
  step();
  CHECK_FALSE(engine->busy());
  CHECK(engine->try_take()->finish_reason == FinishReason::kDeadline);
  CHECK(seconds_left == 5);
  release.set_value();
  while (!was_abandoned) std::this_thread::yield();
}

TEST_CASE("what an environment throws ends its own episode") {
  Setup setup;
  for (const Thread thread : {Thread::kEngine, Thread::kWorker}) {
    const auto runner = make_runner(thread, [](const AssistantTurn& turn, const EpisodeStart& start) {
      if (start.prompt.id == 3 && turn.number == 2) throw std::runtime_error("out of service");
      if (start.prompt.id == 4) throw 5;
      return pseudo_random_answer(turn, start);
    });
    const auto samples = run_episodes(*setup.engine({}), setup.model, many_requests(*runner));
    const auto plain = run_episodes(*setup.engine({}), setup.model,
                                    many_requests(*make_runner(Thread::kEngine, pseudo_random_answer)));
    std::size_t failed = 0;
    for (const auto& [key, sample] : samples) {
      if (sample.finish_reason != FinishReason::kEnvironmentError) {
        check_same_episode(sample, plain.at(key));
        continue;
      }
      ++failed;
      CHECK((key.first == 3 || key.first == 4));
      CHECK(sample.environment_error ==
            (key.first == 3 ? "out of service" : "something that is no std::exception"));
      CHECK(sample.turns.size() == (key.first == 3 ? 2u : 1u));
      const auto& whole = plain.at(key).tokens;
      CHECK(std::equal(sample.tokens.begin(), sample.tokens.end(), whole.begin()));
    }
    CHECK(failed >= 2);
  }
}

TEST_CASE("a reply outside the vocabulary ends its own request with an error") {
  Setup setup;
  for (const Thread thread : {Thread::kEngine, Thread::kWorker}) {
    const auto runner = make_runner(thread, [](const AssistantTurn& turn, const EpisodeStart& start) {
      Observation observation = pseudo_random_answer(turn, start);
      if (start.prompt.id == 5) {
        observation.over = false;
        observation.tokens = {259};
      }
      return observation;
    });
    const auto engine = setup.engine({});
    engine->submit(episode_request(*runner, 5));
    engine->submit(episode_request(*runner, 6));
    std::string error;
    while (engine->busy()) {
      try {
        engine->step(setup.model.parameters().weights(), 0);
      } catch (const InvalidArgument& thrown) {
        error = thrown.what();
      }
    }
    CHECK_THAT(error, ContainsSubstring("prompt 5: token id 259 is outside the vocabulary of 259"));
    CHECK(engine->try_take()->prompt_id == 6);
    CHECK_FALSE(engine->try_take().has_value());
    CHECK(engine->cache().num_available() == engine->cache().num_blocks());
  }
}

TEST_CASE("episodes can be cancelled at any moment; late replies are ignored") {
  Setup setup;
  const auto plain = run_episodes(*setup.engine({}), setup.model,
                                  many_requests(*make_runner(Thread::kEngine, pseudo_random_answer)));
  for (const int steps : {1, 5, 20, 60}) {
    const auto runner =
        make_runner(Thread::kWorker, [](const AssistantTurn& turn, const EpisodeStart& start) {
          std::this_thread::sleep_for(std::chrono::milliseconds(2));
          return pseudo_random_answer(turn, start);
        });
    const auto engine = setup.engine({});
    std::vector<RequestId> ids;
    for (const GenerationRequest& request : many_requests(*runner)) ids.push_back(engine->submit(request));
    for (int i = 0; i < steps; ++i) engine->step(setup.model.parameters().weights(), 0);
    for (std::size_t i = 0; i < ids.size(); i += 2) engine->cancel(ids[i]);
    engine->scheduler().check();
    std::size_t taken = 0;
    while (engine->busy() || taken == 0) {
      engine->step(setup.model.parameters().weights(), 0);
      while (auto sample = engine->try_take()) {
        ++taken;
        const Sample& whole = plain.at({sample->prompt_id, sample->sample_index});
        if (sample->finish_reason == FinishReason::kCancelled)
          CHECK(std::equal(sample->tokens.begin(), sample->tokens.end(), whole.tokens.begin()));
        else
          check_same_episode(*sample, whole);
      }
    }
    CHECK(taken == plain.size());
    CHECK(engine->cache().num_available() == engine->cache().num_blocks());
  }
}

TEST_CASE("an engine may be destroyed while environments are at work") {
  Setup setup;
  auto runner = make_runner(Thread::kWorker, [](const AssistantTurn& turn, const EpisodeStart& start) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    return pseudo_random_answer(turn, start);
  });
  for (const int steps : {3, 10, 30}) {
    const auto engine = setup.engine({});
    for (const GenerationRequest& request : many_requests(*runner)) engine->submit(request);
    for (int i = 0; i < steps; ++i) engine->step(setup.model.parameters().weights(), 0);
    if (steps == 30) runner.reset();
  }
}

// What can happen to a request between submission and its last token must not change what it says.
#include <algorithm>
#include <cmath>
#include <set>

#include "rlhf/core/error.h"
#include "tests/rollout/support.h"

using namespace rlhf;

namespace {

// Requests whose responses outgrow a small cache: 14 samples of up to 80 tokens.
std::vector<GenerationRequest> growing_requests() {
  std::vector<GenerationRequest> requests;
  for (PromptId id = 0; id < 7; ++id) {
    requests.push_back(make_request(id, 3 + 5 * id, 50));
    requests.back().num_samples = 2;
    requests.back().priority = static_cast<int>(id % 3) - 1;
    if (id % 2 == 1) requests.back().sampling.top_p = 0.9;
  }
  return requests;
}

}  // namespace

TEST_CASE("preempted samples are computed again to the same tokens and the same log-probs, bit for bit") {
  Setup setup;
  const auto requests = growing_requests();
  const auto plain = run(*setup.engine({}), setup.model, requests);
  for (const std::int64_t blocks : {6, 9, 15, 90})
    for (const std::int64_t budget : {3, 16, 500}) {
      RolloutEngineOptions options;
      options.num_blocks = blocks;
      options.max_tokens_per_step = budget;
      auto engine = setup.engine(options);
      const auto samples = run(*engine, setup.model, requests);
      INFO(blocks << " blocks, " << budget << " tokens a step");
      REQUIRE(samples.size() == plain.size());
      for (const auto& [key, sample] : samples) check_equal(sample, plain.at(key));
      if (blocks < 15 && budget > 3) CHECK(engine->statistics().preemptions > 0);
      if (blocks == 90) CHECK(engine->statistics().preemptions == 0);
      CHECK(engine->cache().num_available() == engine->cache().num_blocks());
    }
}

TEST_CASE("a limit that moves, pauses and a caller that takes slowly change no sample (seeds 1 to 5)") {
  Setup setup;
  const auto requests = growing_requests();
  const auto plain = run(*setup.engine({}), setup.model, requests);
  for (std::uint64_t seed = 1; seed <= 5; ++seed) {
    INFO("seed " << seed);
    RandomStream random(seed);
    RolloutEngineOptions options;
    options.num_blocks = 24;
    options.max_tokens_per_step = 20;
    options.max_finished = 3;
    auto engine = setup.engine(options);
    for (const auto& request : requests) engine->submit(request);
    std::map<Key, Sample> samples;
    for (int steps = 0; engine->busy() || samples.size() < plain.size(); ++steps) {
      REQUIRE(steps < 5000);
      if (random.below(10) == 0) engine->set_block_limit(static_cast<std::int64_t>(6 + random.below(19)));
      const bool is_paused = random.below(8) == 0;
      if (is_paused) {
        engine->pause();
        engine->set_block_limit(static_cast<std::int64_t>(random.below(2)) * 6);
        CHECK_FALSE(engine->step(setup.model.parameters().weights(), 0));
        engine->set_block_limit(24);
        engine->resume();
      }
      engine->step(setup.model.parameters().weights(), 0);
      engine->scheduler().check();
      if (random.below(6) != 0) continue;
      while (auto sample = engine->try_take()) {
        const Key key{sample->prompt_id, sample->sample_index};
        REQUIRE(samples.emplace(key, std::move(*sample)).second);
      }
    }
    for (const auto& [key, sample] : samples) check_equal(sample, plain.at(key));
  }
}

TEST_CASE("a cancelled request comes out as it is, the others as they would have been") {
  Setup setup;
  const auto requests = growing_requests();
  const auto plain = run(*setup.engine({}), setup.model, requests);
  for (const int steps : {0, 1, 7, 20}) {
    RolloutEngineOptions options;
    options.max_sequences = 5;
    auto engine = setup.engine(options);
    std::vector<RequestId> ids;
    for (const auto& request : requests) ids.push_back(engine->submit(request));
    for (int i = 0; i < steps; ++i) engine->step(setup.model.parameters().weights(), 0);
    CHECK(engine->cancel(ids[2]) == 2);
    CHECK(engine->cancel(ids[2]) == 0);
    std::size_t cancelled = 0, others = 0;
    while (engine->busy()) engine->step(setup.model.parameters().weights(), 0);
    while (auto sample = engine->try_take()) {
      const Sample& expected = plain.at({sample->prompt_id, sample->sample_index});
      if (sample->prompt_id != 2) {
        check_equal(*sample, expected);
        ++others;
        continue;
      }
      CHECK(sample->finish_reason == FinishReason::kCancelled);
      CHECK(std::ranges::equal(
          sample->tokens,
          std::span(expected.tokens).first(std::min(sample->tokens.size(), expected.tokens.size()))));
      ++cancelled;
    }
    CHECK(cancelled == 2);
    CHECK(others == 12);
    CHECK(engine->cache().num_available() == engine->cache().num_blocks());
  }
}

TEST_CASE("deadlines end a request in engine steps and on the injected clock") {
  Setup setup;
  double now = 100;
  RolloutEngineOptions options;
  options.clock = [&now] { return now; };
  auto engine = setup.engine(options);
  auto by_steps = make_request(1, 8, 40), by_time = make_request(2, 8, 40);
  by_steps.deadline.steps = 6;
  by_time.deadline.seconds = 2.5;
  by_time.num_samples = 2;
  const auto plain = run(*setup.engine({}), setup.model, {make_request(1, 8, 40)});
  engine->submit(by_steps);
  engine->submit(by_time);
  std::map<PromptId, std::vector<Sample>> samples;
  for (int i = 0; engine->busy(); ++i) {
    REQUIRE(i < 20);
    engine->step(setup.model.parameters().weights(), 0);
    now += 0.25;
    while (auto sample = engine->try_take()) samples[sample->prompt_id].push_back(std::move(*sample));
  }
  REQUIRE(samples[1].size() == 1);
  CHECK(samples[1][0].finish_reason == FinishReason::kDeadline);
  CHECK(samples[1][0].tokens ==
        std::vector<TokenId>(plain.at({1, 0}).tokens.begin(), plain.at({1, 0}).tokens.begin() + 6));
  REQUIRE(samples[2].size() == 2);
  CHECK(samples[2][0].tokens.size() == 10);  // steps at 100, 100.25, ... 102.25
  CHECK(samples[2][1].tokens.size() == 9);   // its prompt was computed in the first step
  CHECK(std::string(to_string(samples[2][0].finish_reason)) == "deadline");
}

TEST_CASE("a limit under which nothing can run is told, not waited for") {
  Setup setup;
  auto engine = setup.engine({});
  engine->submit(make_request(1, 40, 20));
  engine->set_block_limit(2);
  CHECK_THROWS_WITH(
      engine->step(setup.model.parameters().weights(), 0),
      "rollout: nothing can run with 2 K/V blocks: the next sample needs 3; raise the limit with "
      "set_block_limit, or pause the engine");
  engine->set_block_limit(4);
  CHECK(run(*engine, setup.model, {}).size() == 1);
  CHECK_THROWS_WITH(engine->set_block_limit(65), "rollout: a block limit of 65, expected 0 to 64");
  CHECK_THROWS_WITH(engine->submit(make_request(1, 60, 30)),
                    ContainsSubstring("needs 6 K/V blocks but the cache has 4"));
}

TEST_CASE("a bad request costs the others nothing, and the first bad place is named") {
  Setup setup;
  LanguageModel broken = make_model();
  const auto* embedding = broken.parameters().find("model.embed_tokens.weight");
  REQUIRE(embedding);
  embedding->value[250 * 24] = std::nanf("");
  // The head is tied to the embedding: token 250 must not be looked at.
  auto good = make_request(1, 8, 12);
  for (TokenId& token : good.prompt) token %= 200;
  good.constraint.choices = {{1, 2, 3}};
  for (const auto& [position, place] :
       {std::pair<std::size_t, std::string>{3, "layer 1 of 2"}, {7, "the embedding"}}) {
    auto bad = good;
    bad.prompt_id = 2;
    bad.prompt[position] = 250;
    auto engine = setup.engine({});
    engine->submit(bad);
    engine->submit(good);
    CHECK_THROWS_WITH(engine->step(broken.parameters().weights(), 4),
                      "rollout: logits of prompt 2, sample 0, token 0 are not finite, first in " + place +
                          " (weights version 4)");
    engine->scheduler().check();
    const auto samples = run(*engine, broken, {}, 4);
    REQUIRE(samples.size() == 1);
    CHECK(samples.at({1, 0}).tokens == std::vector<TokenId>{1, 2, 3});
  }
}

TEST_CASE("choices: the response is one of them, drawn from the model's distribution over what is left") {
  Setup setup;
  auto engine = setup.engine({});
  auto request = make_request(1, 12, 24);
  request.num_samples = 60;
  request.stop.tokens = {258};
  request.constraint.choices = {{10, 11, 12}, {10, 11}, {10, 40}, {77}};
  request.output.raw_logprobs = true;
  std::set<std::vector<TokenId>> seen;
  for (const auto& [key, sample] : run(*engine, setup.model, {request})) {
    CHECK(sample.finish_reason == FinishReason::kStop);
    auto words = sample.tokens;
    const bool ended = words.back() == 258;
    if (ended) words.pop_back();
    CHECK(ended == (words == std::vector<TokenId>{10, 11}));
    CHECK(std::ranges::count(request.constraint.choices, words) == 1);
    seen.insert(words);
    // First token: 10 or 77, in the proportion of the model.
    const auto all = setup.next_logprobs(request.prompt);
    const double a = all[10], b = all[77];
    const double expected = (words[0] == 10 ? a : b) - std::log(std::exp(a) + std::exp(b));
    CHECK(sample.logprobs[0] == Approx(expected).margin(1e-5));
    CHECK(sample.raw_logprobs[0] == Approx(all[static_cast<std::size_t>(words[0])]).margin(1e-5));
    if (words.size() == 3) CHECK(sample.logprobs[2] != 0);  // 12 or the end
    if (words == std::vector<TokenId>{77}) CHECK(sample.logprobs.size() == 1);
  }
  CHECK(seen.size() >= 3);
  // Greedy takes the most probable path; the log-prob is the model's own.
  request.num_samples = 1;
  const auto best = run(*engine, setup.model, {greedy(request)}).at({1, 0});
  CHECK(best.logprobs == best.raw_logprobs);
}

TEST_CASE("allowed tokens and biases act before the draw") {
  Setup setup;
  auto engine = setup.engine({});
  auto request = make_request(1, 12, 10);
  request.num_samples = 8;
  request.constraint.allowed_tokens = {3, 4, 5};
  request.output.entropies = true;
  for (const auto& [key, sample] : run(*engine, setup.model, {request})) {
    CHECK(std::ranges::all_of(sample.tokens, [](TokenId t) { return t >= 3 && t <= 5; }));
    CHECK(
        std::ranges::all_of(sample.entropies, [](float h) { return h >= 0 && h <= std::log(3.0F) + 1e-5F; }));
  }
  request.constraint.allowed_tokens.clear();
  request.constraint.logit_bias = {{200, 100.0F}};
  for (const auto& [key, sample] : run(*engine, setup.model, {request}))
    CHECK(sample.tokens == std::vector<TokenId>(10, 200));
}

TEST_CASE("raw log-probs, entropies and the most probable tokens are those of the full forward pass") {
  Setup setup;
  auto engine = setup.engine({});
  auto request = make_request(1, 12, 6);
  request.sampling.temperature = 0.7;
  request.sampling.top_k = 5;
  request.output = {.raw_logprobs = true, .entropies = true, .top_logprobs = 4};
  const auto sample = run(*engine, setup.model, {request}).at({1, 0});
  REQUIRE(sample.raw_logprobs.size() == 6);
  REQUIRE(sample.entropies.size() == 6);
  REQUIRE(sample.top_logprobs.size() == 6);
  auto context = request.prompt;
  for (std::size_t t = 0; t < 6; ++t) {
    auto own = setup.next_logprobs(context, 0.7);
    CHECK(sample.raw_logprobs[t] == Approx(own[static_cast<std::size_t>(sample.tokens[t])]).margin(1e-5));
    for (const auto& [token, log_prob] : sample.top_logprobs[t])
      CHECK(log_prob == Approx(own[static_cast<std::size_t>(token)]).margin(1e-5));
    context.push_back(sample.tokens[t]);
    // The distribution drawn from is that of the five largest.
    std::ranges::sort(own, std::greater<>());
    double mass = 0, entropy = 0;
    for (int i = 0; i < 5; ++i) mass += std::exp(static_cast<double>(own[static_cast<std::size_t>(i)]));
    for (int i = 0; i < 5; ++i) {
      const double p = std::exp(static_cast<double>(own[static_cast<std::size_t>(i)])) / mass;
      entropy -= p * std::log(p);
    }
    CHECK(sample.entropies[t] == Approx(entropy).margin(1e-4));
    REQUIRE(sample.top_logprobs[t].size() == 4);
    CHECK(sample.top_logprobs[t][0].log_prob == Approx(own[0]).margin(1e-5));
    CHECK(sample.top_logprobs[t][3].log_prob == Approx(own[3]).margin(1e-5));
  }
}

TEST_CASE("constraints, deadlines and outputs that cannot work are refused") {
  Setup setup;
  auto engine = setup.engine({});
  const auto refused = [&](const std::function<void(GenerationRequest&)>& change,
                           const std::string& message) {
    auto request = make_request(9, 10, 5);
    change(request);
    CHECK_THROWS_WITH(engine->submit(request), "generation request for prompt 9: " + message);
  };
  using R = GenerationRequest;
  refused(
      [](R& r) {
        r.constraint.logit_bias = {{259, 1.0F}};
      },
      "logit_bias: token 259 is outside the vocabulary of 259");
  refused(
      [](R& r) {
        r.constraint.logit_bias = {{2, -INFINITY}};
      },
      "logit_bias of token 2 is -inf, expected a finite number; allowed_tokens excludes tokens");
  refused([](R& r) { r.constraint.allowed_tokens = {-1}; },
          "allowed token -1 is outside the vocabulary of 259");
  refused([](R& r) { r.constraint.choices = {{1}, {}}; }, "choice 2 is empty");
  refused([](R& r) { r.constraint.choices = {{1, 2}, {3}, {1, 2}}; }, "choice 3 equals choice 1");
  refused(
      [](R& r) {
        r.constraint.choices = {{1, 400}};
      },
      "choice token 400 is outside the vocabulary of 259");
  refused(
      [](R& r) {
        r.constraint.choices = {{1, 2, 3, 4, 5, 6}};
      },
      "choice 1 has 6 tokens, the response at most 5");
  refused(
      [](R& r) {
        r.constraint.choices = {{1, 2}, {1}};
      },
      "choice 2 is the beginning of another one, which needs a stop token to end it");
  refused(
      [](R& r) {
        r.constraint.choices = {{1}};
        r.constraint.allowed_tokens = {1};
      },
      "choices cannot be combined with allowed_tokens or an environment");
  refused([](R& r) { r.priority = 1001; }, "priority is 1001, expected -1000 to 1000");
  refused([](R& r) { r.deadline.seconds = -1; },
          "the deadline is 0 steps and -1 seconds, expected at least 0");
  refused([](R& r) { r.output.top_logprobs = 260; }, "top_logprobs is 260, expected 0 to 259");
  CHECK_FALSE(engine->busy());
}

// The engine against full forward passes, and against itself under other batches, budgets and caches.
#include <algorithm>
#include <cmath>
#include <set>

#include "rlhf/core/error.h"
#include "tests/rollout/support.h"

using namespace rlhf;

TEST_CASE("greedy decoding takes the argmax of the full forward pass") {
  Setup setup;
  auto engine = setup.engine({});
  for (std::size_t prompt_tokens : {1u, 2u, 15u, 16u, 17u, 33u, 60u}) {
    const auto request = greedy(make_request(prompt_tokens, prompt_tokens, 20));
    const auto samples = run(*engine, setup.model, {request});
    const Sample& sample = samples.at({prompt_tokens, 0});
    CHECK(sample.tokens == setup.greedy_continuation(request.prompt, 20));
    CHECK(sample.finish_reason == FinishReason::kLength);
    CHECK(sample.mask == std::vector<std::uint8_t>(20, 1));
    // The model's own log-prob is recorded.
    auto context = request.prompt;
    for (std::size_t t = 0; t < sample.tokens.size(); ++t) {
      CHECK(sample.logprobs[t] ==
            Approx(setup.next_logprobs(context)[static_cast<std::size_t>(sample.tokens[t])]).margin(2e-6));
      context.push_back(sample.tokens[t]);
    }
  }
}

TEST_CASE("recorded log-probs equal those of a training pass, bit for bit") {
  Setup setup;
  for (const double temperature : {1.0, 0.7, 1.3}) {
    std::vector<GenerationRequest> requests;
    for (PromptId id = 0; id < 6; ++id) {
      requests.push_back(make_request(id, 5 + 9 * id, 30));
      requests.back().num_samples = 2;
      requests.back().sampling.temperature = temperature;
    }
    RolloutEngineOptions options;
    options.max_sequences = 5;
    options.max_tokens_per_step = 20;
    const auto samples = run(*setup.engine(options), setup.model, requests);
    REQUIRE(samples.size() == 12);
    SequencePass<float> pass(setup.model.config(), Compute<float>(setup.pool, kernels::detect_cpu_isa()));
    std::size_t different = 0;
    double gap = 0;
    for (const auto& [key, sample] : samples) {
      auto tokens = requests[key.first].prompt;
      const auto prompt = static_cast<std::int64_t>(tokens.size());
      tokens.insert(tokens.end(), sample.tokens.begin(), sample.tokens.end());
      std::vector<TokenTarget> targets;
      for (std::size_t t = 0; t < sample.tokens.size(); ++t)
        targets.push_back({prompt - 1 + static_cast<std::int64_t>(t), sample.tokens[t]});
      std::vector<float> logprobs(targets.size());
      const PackedRows rows({tokens});
      pass.forward(setup.model.parameters().weights(), rows, SequencePass<float>::Keep::kNothing);
      pass.token_logprobs(setup.model.parameters().weights(), targets, temperature, logprobs, {});
      for (std::size_t t = 0; t < targets.size(); ++t) {
        different += logprobs[t] != sample.logprobs[t];
        gap = std::max(gap,
                       std::abs(static_cast<double>(logprobs[t]) - static_cast<double>(sample.logprobs[t])));
      }
    }
    INFO("temperature " << temperature << ", largest gap " << gap);
    CHECK(different == 0);
  }
}

TEST_CASE("a step takes 512 rows on a CPU, more on an accelerator, or what it is told") {
  CHECK(step_tokens(0, true) == 4096);
  CHECK(step_tokens(77, true) == 77);
  Setup setup;
  for (const std::int64_t told : {0, 300}) {
    RolloutEngineOptions options;
    options.max_tokens_per_step = told;
    options.num_blocks = 100;
    const auto engine = setup.engine(options);
    for (PromptId id = 0; id < 8; ++id) engine->submit(make_request(id, 90, 2));
    engine->step(setup.model.parameters().weights(), 0);
    CHECK(engine->statistics().prefill_tokens + engine->statistics().decode_tokens ==
          (told == 0 ? 512 : 300));
  }
}

TEST_CASE("a sample does not depend on what runs beside it, on budgets or on threads") {
  Setup setup;
  const auto requests = mixed_requests();
  std::map<Key, Sample> alone;
  for (const GenerationRequest& request : requests)
    for (std::uint32_t i = 0; i < request.num_samples; ++i) {
      GenerationRequest one = request;
      one.num_samples = 1;
      one.first_sample_index = i;
      RolloutEngineOptions options;
      options.max_sequences = 1;
      options.max_tokens_per_step = 1000;
      alone.merge(run(*setup.engine(options), setup.model, {one}));
    }
  struct Case {
    std::int64_t max_sequences, max_tokens_per_step, num_blocks;
    int threads;
  };
  for (const Case& c : {Case{1, 1, 64, 1}, Case{3, 7, 64, 1}, Case{5, 64, 12, 1}, Case{40, 512, 300, 1},
                        Case{8, 33, 30, 2}, Case{40, 512, 300, 3}}) {
    ThreadPool pool(c.threads);
    RolloutEngineOptions options;
    options.max_sequences = c.max_sequences;
    options.max_tokens_per_step = c.max_tokens_per_step;
    options.num_blocks = c.num_blocks;
    RolloutEngine engine(setup.model.config(), Compute<float>(pool, kernels::detect_cpu_isa()), options, {});
    INFO("max_sequences " << c.max_sequences << ", max_tokens_per_step " << c.max_tokens_per_step
                          << ", blocks " << c.num_blocks << ", threads " << c.threads);
    const auto together = run(engine, setup.model, requests);
    REQUIRE(together.size() == alone.size());
    for (const auto& [key, sample] : together) check_equal(sample, alone.at(key));
    // Again, in reverse order and with whatever prefixes the cache has kept.
    const auto before = engine.statistics().cached_prefix_tokens;
    const std::vector<GenerationRequest> reversed(requests.rbegin(), requests.rend());
    for (const auto& [key, sample] : run(engine, setup.model, reversed)) check_equal(sample, alone.at(key));
    if (c.num_blocks >= 64) CHECK(engine.statistics().cached_prefix_tokens >= before + 5 * 32);
    CHECK(engine.cache().num_available() == engine.cache().num_blocks());
  }
}

TEST_CASE(
    "samples carry the states behind the first layers, bit for bit, also from shared and preempted blocks") {
  Setup setup;
  RolloutEngineOptions options;
  options.trunk_layers = 1;
  options.max_sequences = 6;
  options.max_tokens_per_step = 24;
  options.num_blocks = 9;
  const auto engine = setup.engine(options);
  auto requests = mixed_requests();
  for (GenerationRequest& request : requests) {  // so long that they outgrow the cache together
    request.stop.tokens.clear();
    request.stop.max_new_tokens += 20;
  }
  std::map<PromptId, std::vector<TokenId>> prompts;
  for (const GenerationRequest& request : requests) prompts[request.prompt_id] = request.prompt;
  const auto width = static_cast<std::size_t>(setup.model.config().hidden_size);
  SequencePass<float> pass(setup.model.config(), Compute<float>(setup.pool, kernels::detect_cpu_isa()));
  std::size_t compared = 0;
  for (const auto& [key, sample] : run(*engine, setup.model, requests)) {
    INFO("prompt " << sample.prompt_id << ", sample " << sample.sample_index);
    std::vector<TokenId> tokens = prompts.at(sample.prompt_id);
    tokens.insert(tokens.end(), sample.tokens.begin(), sample.tokens.end() - 1);
    REQUIRE(sample.trunk.size() == tokens.size() * width);
    const PackedRows rows({tokens});
    pass.run_trunk(setup.model.parameters().weights(), rows, 1);
    CHECK(std::equal(sample.trunk.begin(), sample.trunk.end(), pass.trunk()));
    ++compared;
  }
  CHECK(compared > requests.size() / 2);
  CHECK(engine->statistics().preemptions > 0);
  CHECK(engine->statistics().cached_prefix_tokens > 0);
}

TEST_CASE("several samples of a prompt differ, are numbered, and equal samples asked for one by one") {
  Setup setup;
  auto request = make_request(3, 20, 12);
  request.num_samples = 9;
  request.first_sample_index = 4;
  RolloutEngineOptions options;
  options.max_sequences = 2;
  const auto samples = run(*setup.engine(options), setup.model, {request});
  REQUIRE(samples.size() == 9);
  std::set<std::vector<TokenId>> distinct;
  for (std::uint32_t i = 4; i < 13; ++i) distinct.insert(samples.at({3, i}).tokens);
  CHECK(distinct.size() == 9);
  auto other_seed = request;
  other_seed.seed = 43;
  CHECK(run(*setup.engine(options), setup.model, {other_seed}).at({3, 4}).tokens !=
        samples.at({3, 4}).tokens);
}

TEST_CASE("stop tokens end a response and belong to it; before min_new_tokens they cannot be drawn") {
  Setup setup;
  auto engine = setup.engine({});
  auto request = greedy(make_request(1, 12, 24));
  const auto free = setup.greedy_continuation(request.prompt, 24);
  const TokenId stop = free[6];
  const auto first = static_cast<std::size_t>(std::ranges::find(free, stop) - free.begin());
  request.stop.tokens = {stop};
  const auto stopped = run(*engine, setup.model, {request}).at({1, 0});
  CHECK(stopped.tokens ==
        std::vector<TokenId>(free.begin(), free.begin() + static_cast<std::ptrdiff_t>(first) + 1));
  CHECK(stopped.finish_reason == FinishReason::kStop);
  // The last allowed token may be a stop token, too.
  request.stop.max_new_tokens = static_cast<std::int64_t>(first) + 1;
  CHECK(run(*engine, setup.model, {request}).at({1, 0}).finish_reason == FinishReason::kStop);

  auto sampled = make_request(2, 12, 24);
  for (TokenId token = 0; token < 250; ++token) sampled.stop.tokens.push_back(token);
  sampled.stop.min_new_tokens = 10;
  sampled.num_samples = 4;
  for (const auto& [key, sample] : run(*engine, setup.model, {sampled})) {
    REQUIRE(sample.tokens.size() >= 11);
    for (std::size_t t = 0; t < 10; ++t) CHECK(sample.tokens[t] >= 250);
    CHECK(sample.finish_reason == FinishReason::kStop);
    // Log-probs are those of the distribution without the stop tokens.
    const auto logprobs = setup.next_logprobs(sampled.prompt);
    double mass = 0;
    for (std::size_t token = 250; token < logprobs.size(); ++token)
      mass += std::exp(static_cast<double>(logprobs[token]));
    CHECK(sample.logprobs[0] ==
          Approx(static_cast<double>(logprobs[static_cast<std::size_t>(sample.tokens[0])]) - std::log(mass))
              .margin(1e-5));
  }
}

TEST_CASE("the model's context bounds a response") {
  Setup setup;
  auto engine = setup.engine({});
  const auto samples =
      run(*engine, setup.model, {greedy(make_request(1, 92, 50)), greedy(make_request(2, 95, 50))});
  CHECK(samples.at({1, 0}).tokens.size() == 4);
  CHECK(samples.at({2, 0}).tokens.size() == 1);
  CHECK(samples.at({1, 0}).finish_reason == FinishReason::kLength);
}

TEST_CASE("a stop string ends a response also when it spans tokens") {
  Setup setup;
  auto engine = setup.engine({});
  auto request = greedy(make_request(1, 12, 24));
  const auto free = setup.greedy_continuation(request.prompt, 24);
  std::string text;
  for (TokenId token : free) text += setup.model.tokenizer().token_bytes(token);
  REQUIRE(text.size() == free.size());  // a byte a token
  for (const auto& [begin, length] :
       {std::pair<std::size_t, std::size_t>{0, 1}, {4, 1}, {4, 3}, {9, 7}, {21, 3}}) {
    const std::string stop = text.substr(begin, length);
    const std::size_t end = text.find(stop) + length;
    request.stop.strings = {std::string("never in it"), stop};
    const auto sample = run(*engine, setup.model, {request}).at({1, 0});
    INFO("stop at " << begin << ", " << length << " bytes");
    CHECK(sample.tokens ==
          std::vector<TokenId>(free.begin(), free.begin() + static_cast<std::ptrdiff_t>(end)));
    CHECK(sample.finish_reason == FinishReason::kStopString);
  }
  // The prompt is not searched, not even for the beginning of a string.
  std::string prompt_text;
  for (TokenId token : request.prompt) prompt_text += setup.model.tokenizer().token_bytes(token);
  request.stop.strings = {prompt_text.substr(10), prompt_text.back() + text.substr(0, 1)};
  const bool in_text = text.find(request.stop.strings[0]) != std::string::npos ||
                       text.find(request.stop.strings[1]) != std::string::npos;
  REQUIRE_FALSE(in_text);
  CHECK(run(*engine, setup.model, {request}).at({1, 0}).tokens == free);
}

TEST_CASE("a reply inside a turn is forced into the response, masked, and goes into the context") {
  Setup setup;
  auto engine = setup.engine({});
  auto request = greedy(make_request(1, 18, 30));
  const auto free = setup.greedy_continuation(request.prompt, 30);
  std::string text;
  for (TokenId token : free) text += setup.model.tokenizer().token_bytes(token);
  const std::string trigger = text.substr(5, 2);
  const std::size_t call = text.find(trigger) + 2;
  const std::vector<TokenId> forced = {200, 201, 202, 203, 204};
  std::vector<std::string> seen;
  request.turns = std::make_shared<InlineHandler>(trigger, [&](std::string_view turn) {
    seen.emplace_back(turn);
    return seen.size() == 1 ? forced : std::vector<TokenId>();
  });
  const auto sample = run(*engine, setup.model, {request}).at({1, 0});
  CHECK(seen.at(0) == text.substr(0, call));
  std::vector<TokenId> expected(free.begin(), free.begin() + static_cast<std::ptrdiff_t>(call));
  expected.insert(expected.end(), forced.begin(), forced.end());
  auto context = request.prompt;
  context.insert(context.end(), expected.begin(), expected.end());
  const auto rest = setup.greedy_continuation(context, 30 - expected.size());
  expected.insert(expected.end(), rest.begin(), rest.end());
  CHECK(sample.tokens == expected);
  for (std::size_t t = 0; t < 30; ++t) {
    const bool is_forced = t >= call && t < call + forced.size();
    CHECK(sample.mask[t] == (is_forced ? 0 : 1));
    if (is_forced) CHECK(sample.logprobs[t] == 0);
  }
  CHECK(sample.finish_reason == FinishReason::kLength);
  CHECK(engine->cache().num_available() == engine->cache().num_blocks());

  SECTION("a reply counts towards the longest response, which ends before one that leaves no room") {
    for (const std::size_t room : {1u, 3u, 5u, 6u}) {
      seen.clear();
      request.stop.max_new_tokens = static_cast<std::int64_t>(call + room);
      const auto cut = run(*engine, setup.model, {request}).at({1, 0});
      const std::size_t length = room > forced.size() ? call + room : call;
      CHECK(cut.tokens ==
            std::vector<TokenId>(expected.begin(), expected.begin() + static_cast<std::ptrdiff_t>(length)));
      CHECK(cut.mask.back() == 1);
      CHECK(cut.finish_reason == FinishReason::kLength);
    }
  }
  SECTION("an empty reply changes nothing") {
    // A trigger that the model writes again and again: any single byte.
    std::size_t calls = 0;
    request.turns = std::make_shared<InlineHandler>(text.substr(0, 1), [&](std::string_view) {
      ++calls;
      return std::vector<TokenId>();
    });
    const auto same = run(*engine, setup.model, {request}).at({1, 0});
    CHECK(same.tokens == free);
    CHECK(same.mask == std::vector<std::uint8_t>(30, 1));
    CHECK(same.turns.size() == calls);
    CHECK(calls == static_cast<std::size_t>(std::ranges::count(text.substr(0, 29), text[0])));
  }
  SECTION("tokens outside the vocabulary are refused") {
    request.turns =
        std::make_shared<InlineHandler>(trigger, [](std::string_view) { return std::vector<TokenId>{259}; });
    engine->submit(request);
    CHECK_THROWS_WITH(
        [&] {
          while (engine->busy()) engine->step(setup.model.parameters().weights(), 0);
        }(),
        ContainsSubstring("prompt 1") && ContainsSubstring("token id 259 is outside the vocabulary of 259"));
  }
}

TEST_CASE("a cancelled engine is empty and serves the next requests as a new one") {
  Setup setup;
  RolloutEngineOptions options;
  options.max_sequences = 4;
  options.max_tokens_per_step = 16;
  const auto requests = mixed_requests();
  const auto expected = run(*setup.engine(options), setup.model, requests);
  for (int steps : {0, 1, 2, 5, 11}) {
    auto engine = setup.engine(options);
    for (const auto& request : requests) engine->submit(request);
    for (int i = 0; i < steps; ++i) engine->step(setup.model.parameters().weights(), 0);
    engine->cancel_all();
    CHECK_FALSE(engine->busy());
    engine->cache().check();
    CHECK(engine->cache().num_available() == engine->cache().num_blocks());
    while (auto sample = engine->try_take())
      check_equal(*sample, expected.at({sample->prompt_id, sample->sample_index}));
    for (const auto& [key, sample] : run(*engine, setup.model, requests))
      check_equal(sample, expected.at(key));
  }
}

TEST_CASE("after new weights and forgotten prefixes an engine gives what a new one gives") {
  Setup setup;
  const LanguageModel other = make_model(5);
  const auto requests = mixed_requests();
  auto engine = setup.engine({});
  run(*engine, setup.model, requests);
  engine->forget_prefixes();
  const auto cached = engine->statistics().cached_prefix_tokens;
  const auto samples = run(*engine, other, {requests[0], requests[1]}, 7);
  CHECK(engine->statistics().cached_prefix_tokens == cached);
  const auto expected = run(*setup.engine({}), other, {requests[0], requests[1]}, 7);
  for (const auto& [key, sample] : samples) {
    check_equal(sample, expected.at(key));
    CHECK(sample.weight_versions == std::vector<WeightVersion>(sample.tokens.size(), 7));
  }
}

TEST_CASE("each token carries the version of the weights that made it") {
  Setup setup;
  auto engine = setup.engine({});
  engine->submit(make_request(1, 1, 5));
  WeightVersion version = 10;
  while (engine->busy()) engine->step(setup.model.parameters().weights(), version++);
  CHECK(engine->try_take()->weight_versions == std::vector<WeightVersion>{10, 11, 12, 13, 14});
  CHECK_FALSE(engine->try_take().has_value());
}

TEST_CASE("a forced last token ends a response of recorded length") {
  Setup setup;
  auto engine = setup.engine({});
  auto request = make_request(1, 10, 7);
  request.stop.forced_last = 258;
  request.stop.tokens = {258};
  request.stop.min_new_tokens = 7;
  const auto sample = run(*engine, setup.model, {request}).at({1, 0});
  CHECK(sample.tokens.size() == 7);
  CHECK(sample.tokens.back() == 258);
  CHECK(std::ranges::count(sample.tokens, 258) == 1);
  CHECK(sample.finish_reason == FinishReason::kStop);
}

TEST_CASE("requests that cannot be served are refused with the reason") {
  Setup setup;
  RolloutEngineOptions options;
  options.num_blocks = 4;
  auto engine = setup.engine(options);
  const auto good = make_request(9, 10, 5);
  const auto submit = [&](const std::function<void(GenerationRequest&)>& change) {
    GenerationRequest request = good;
    change(request);
    engine->submit(request);
  };
  using R = GenerationRequest;
  const std::string where = "generation request for prompt 9: ";
  CHECK_THROWS_WITH(submit([](R& r) { r.prompt.clear(); }), where + "the prompt is empty");
  CHECK_THROWS_WITH(submit([](R& r) { r.num_samples = 0; }), where + "num_samples must be positive");
  CHECK_THROWS_WITH(submit([](R& r) { r.stop.max_new_tokens = 0; }),
                    where + "max_new_tokens must be positive");
  CHECK_THROWS_WITH(submit([](R& r) { r.prompt.resize(96, 1); }),
                    where + "the prompt has 96 tokens, which leaves no room in the model's context of 96");
  CHECK_THROWS_WITH(submit([](R& r) { r.prompt[3] = 259; }),
                    where + "token id 259 is outside the vocabulary of 259");
  CHECK_THROWS_WITH(submit([](R& r) { r.prompt[3] = -1; }),
                    where + "token id -1 is outside the vocabulary of 259");
  CHECK_THROWS_WITH(submit([](R& r) { r.stop.tokens = {300}; }),
                    where + "stop token 300 is outside the vocabulary of 259");
  CHECK_THROWS_WITH(submit([](R& r) { r.stop.forced_last = 259; }),
                    where + "stop token 259 is outside the vocabulary of 259");
  CHECK_THROWS_WITH(
      submit([](R& r) { r.stop.max_new_tokens = 70; }),
      ContainsSubstring(where + "one sample of 10 + 70 tokens needs 5 K/V blocks but the cache has 4"));
  CHECK_THROWS_WITH(submit([](R& r) { r.sampling.temperature = -1; }),
                    where + "temperature is -1, expected at least 0");
  CHECK_THROWS_WITH(submit([](R& r) { r.sampling.temperature = std::nan(""); }),
                    where + "temperature is nan, expected at least 0");
  CHECK_THROWS_WITH(submit([](R& r) { r.sampling.top_p = 1.5; }), where + "top_p is 1.5, expected 0 to 1");
  CHECK_THROWS_WITH(submit([](R& r) { r.sampling.min_p = -0.5; }), where + "min_p is -0.5, expected 0 to 1");
  CHECK_THROWS_WITH(submit([](R& r) { r.sampling.repetition_penalty = 0; }),
                    where + "repetition_penalty is 0, expected above 0");
  RolloutEngine without_text(setup.model.config(), Compute<float>(setup.pool, kernels::detect_cpu_isa()),
                             options, {});
  GenerationRequest request = good;
  request.stop.strings = {"x"};
  CHECK_THROWS_WITH(without_text.submit(request), where + "stop strings and environments need a tokenizer");
  CHECK_FALSE(engine->busy());
  CHECK(run(*engine, setup.model, {good}).size() == 1);
  options.max_sequences = 0;
  CHECK_THROWS_WITH(setup.engine(options), ContainsSubstring("must be positive"));
}

TEST_CASE("logits that are not finite name prompt, sample and token") {
  Setup setup;
  LanguageModel broken = make_model();
  const auto* entry = broken.parameters().find("model.embed_tokens.weight");
  REQUIRE(entry);
  entry->value[100] = std::nanf("");
  auto engine = setup.engine({});
  for (const double temperature : {1.0, 0.0}) {
    auto request = make_request(6, 8, 4);
    request.sampling.temperature = temperature;
    engine->submit(request);
    CHECK_THROWS_WITH(
        [&] {
          while (engine->busy()) engine->step(broken.parameters().weights(), 3);
        }(),
        "rollout: logits of prompt 6, sample 0, token 0 are not finite, first in the head (weights version "
        "3)");
    CHECK_FALSE(engine->busy());
  }
  CHECK(engine->cache().num_available() == engine->cache().num_blocks());
}

TEST_CASE("statistics count tokens") {
  Setup setup;
  auto engine = setup.engine({});
  auto request = make_request(1, 20, 6);
  request.num_samples = 3;
  run(*engine, setup.model, {request});
  CHECK(engine->statistics().prefill_tokens == 19);
  CHECK(engine->statistics().decode_tokens == 18);
  CHECK(engine->statistics().cached_prefix_tokens == 0);
  run(*engine, setup.model, {request});
  CHECK(engine->statistics().cached_prefix_tokens == 16);
  CHECK(engine->statistics().prefill_tokens == 19 + 3);
}

TEST_CASE("floating-point operations are those counted by hand") {
  Setup setup;
  auto engine = setup.engine({});
  run(*engine, setup.model, {make_request(1, 5, 3)});
  // Five rows of the prompt and two of the response (what follows the last token is not asked for) go through
  // 2 layers of width 24: queries and keys and values 24 -> 48, output 24 -> 24, three matrices of 24 x 32.
  const double products = 7 * 2 * 2.0 * (24 * 48 + 24 * 24 + 3 * 24 * 32);
  const double attention = 2 * 2 * 2.0 * (1 + 2 + 3 + 4 + 5 + 6 + 7) * 24;
  const double head = 3 * 2.0 * 24 * static_cast<double>(setup.model.config().vocab_size);
  CHECK(engine->statistics().matmul_flops == products + attention + head);
}

TEST_CASE(
    "decoding without cache, or that computes on what has ended, gives the same samples for more work") {
  Setup setup;
  const auto requests = mixed_requests();
  const auto paged = run(*setup.engine({}), setup.model, requests);
  for (const Decoding decoding : {Decoding::kStatic, Decoding::kUncached})
    for (const std::int64_t slots : {3, 64}) {
      RolloutEngineOptions options;
      options.decoding = decoding;
      options.max_sequences = slots;
      options.num_blocks = 600;
      auto engine = setup.engine(options);
      const auto samples = run(*engine, setup.model, requests);
      REQUIRE(samples.size() == paged.size());
      for (const auto& [key, sample] : samples) check_equal(sample, paged.at(key));
      CHECK(engine->cache().num_available() == engine->cache().num_blocks());
    }

  const auto flops = [&](Decoding decoding) {
    RolloutEngineOptions options;
    options.decoding = decoding;
    auto engine = setup.engine(options);
    run(*engine, setup.model, {make_request(1, 5, 3), make_request(2, 5, 6)});
    return engine->statistics().matmul_flops;
  };
  // Rows go through 2 layers of width 24, and see `keys` keys in all; `draws` of them go through the head.
  const auto by_hand = [&](double rows, double keys, double draws) {
    return rows * 2 * 2.0 * (24 * 48 + 24 * 24 + 3 * 24 * 32) + 2 * 2 * 2.0 * keys * 24 +
           draws * 2.0 * 24 * static_cast<double>(setup.model.config().vocab_size);
  };
  const auto triangle = [](double n) { return n * (n + 1) / 2; };
  CHECK(flops(Decoding::kPaged) == by_hand(7 + 10, triangle(7) + triangle(10), 3 + 6));
  CHECK(flops(Decoding::kStatic) == by_hand(2 * 10, 2 * triangle(10), 2 * 6));
  double rows = 0, keys = 0;
  for (const double n : {5, 6, 7, 8, 9, 10}) rows += 2 * n, keys += 2 * triangle(n);
  CHECK(flops(Decoding::kUncached) == by_hand(rows, keys, 2 * 6));
}

TEST_CASE("a cancelled request of static decoding comes out once") {
  Setup setup;
  RolloutEngineOptions options;
  options.decoding = Decoding::kStatic;
  auto engine = setup.engine(options);
  engine->submit(make_request(1, 5, 2));
  const RequestId other = engine->submit(make_request(2, 5, 9));
  std::vector<Sample> samples;
  const auto step = [&] {
    engine->step(setup.model.parameters().weights(), 0);
    while (auto sample = engine->try_take()) samples.push_back(std::move(*sample));
  };
  for (int i = 0; i < 4; ++i) step();
  REQUIRE(samples.size() == 1);
  CHECK(engine->cancel(other) == 1);
  step();
  REQUIRE(samples.size() == 2);
  CHECK(samples[1].finish_reason == FinishReason::kCancelled);
  CHECK_FALSE(engine->busy());
  GenerationRequest hurried = make_request(3, 5, 2);
  hurried.deadline.steps = 5;
  CHECK_THROWS_AS(engine->submit(hurried), InvalidArgument);
}

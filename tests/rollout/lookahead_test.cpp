// Guessed tokens: the table that makes them, and that they change nothing but the number of steps.
#include <algorithm>

#include "rlhf/core/error.h"
#include "tests/rollout/support.h"

using namespace rlhf;

namespace {

std::vector<TokenId> guessed(Lookahead& lookahead, const std::vector<TokenId>& text, std::size_t count) {
  std::vector<Lookahead::Guess> guesses;
  lookahead.guess(text, count, guesses);
  std::vector<TokenId> tokens;
  for (const auto& guess : guesses) tokens.push_back(guess.token);
  return tokens;
}

RolloutEngineOptions with_drafts(std::int64_t rows) {
  RolloutEngineOptions options;
  options.max_draft_rows = rows;
  options.draft_row_cost = 0;  // whatever they promise
  return options;
}

}  // namespace

TEST_CASE("what followed the longest known context is guessed, the most recent where there are several") {
  Lookahead lookahead;
  const std::vector<TokenId> text = {1, 2, 3, 4, 5, 6, 7, 1, 2, 9};
  CHECK(guessed(lookahead, text, 4).empty());
  lookahead.add(text, 0);
  CHECK(guessed(lookahead, {3, 4}, 3) == std::vector<TokenId>{5, 6, 7});
  CHECK(guessed(lookahead, {0, 1, 2}, 1) == std::vector<TokenId>{9});     // two tokens known: most recent
  CHECK(guessed(lookahead, {7, 1, 2}, 1) == std::vector<TokenId>{9});     // three tokens
  CHECK(guessed(lookahead, {6, 7, 1}, 9) == std::vector<TokenId>{2, 9});  // nothing follows the end
  CHECK(guessed(lookahead, {5}, 4).empty());                              // too short to say
  CHECK(guessed(lookahead, {8, 8}, 4).empty());
  lookahead.add(std::vector<TokenId>{0, 0, 3, 4, 8}, 0);
  CHECK(guessed(lookahead, {3, 4}, 1) == std::vector<TokenId>{8});
  CHECK(guessed(lookahead, {2, 3, 4}, 1) == std::vector<TokenId>{5});  // the longer context says otherwise
  // Only tokens from the index on are learnt.
  lookahead.add(std::vector<TokenId>{50, 51, 52, 53, 54}, 4);
  CHECK(guessed(lookahead, {50, 51}, 1).empty());
  CHECK(guessed(lookahead, {52, 53}, 1) == std::vector<TokenId>{54});
}

TEST_CASE("chances follow what guesses turned out to be") {
  Lookahead lookahead;
  lookahead.add(std::vector<TokenId>{1, 2, 3}, 0);
  const auto chance = [&] {
    std::vector<Lookahead::Guess> guesses;
    lookahead.guess(std::vector<TokenId>{1, 2}, 1, guesses);
    return guesses.at(0);
  };
  const double first = chance().chance;
  for (int i = 0; i < 200; ++i) lookahead.judge(chance(), false);
  CHECK(chance().chance < 0.01);
  for (int i = 0; i < 200; ++i) lookahead.judge(chance(), true);
  CHECK(chance().chance > 0.99);
  CHECK(first > 0.1);
  CHECK_THROWS_AS(Lookahead(2), InvalidArgument);
}

TEST_CASE("guesses change no sample: tokens, log-probs and ends are those of plain decoding, bit for bit") {
  Setup setup;
  auto requests = mixed_requests();
  const auto plain = run(*setup.engine({}), setup.model, requests);
  for (const std::int64_t rows : {2, 5, 40, 400})
    for (const std::int64_t blocks : {12, 200}) {
      auto options = with_drafts(rows);
      options.num_blocks = blocks;
      auto engine = setup.engine(options);
      // Twice: the second time nearly every guess of a repeated text is right.
      for (int round = 0; round < 2; ++round) {
        const auto samples = run(*engine, setup.model, requests);
        INFO(rows << " rows, " << blocks << " blocks, round " << round);
        REQUIRE(samples.size() == plain.size());
        for (const auto& [key, sample] : samples) check_equal(sample, plain.at(key));
      }
      engine->scheduler().check();
      CHECK(engine->cache().num_available() == engine->cache().num_blocks());
      const auto statistics = engine->statistics();
      CHECK(statistics.accepted_drafts <= statistics.draft_tokens);
      if (blocks == 200 && rows >= 40) CHECK(statistics.accepted_drafts > 20);
    }
}

TEST_CASE("a repeated request takes a fraction of the steps") {
  Setup setup;
  auto engine = setup.engine(with_drafts(9));
  const std::vector<GenerationRequest> requests = {make_request(1, 12, 60)};
  const auto first = run(*engine, setup.model, requests);
  const auto before = engine->statistics();
  const auto second = run(*engine, setup.model, requests);
  const auto after = engine->statistics();
  check_equal(second.at({1, 0}), first.at({1, 0}));
  CHECK(before.steps >= 50);
  CHECK(after.steps - before.steps <= 20);  // 60 tokens in steps of up to 9
  CHECK(after.decode_tokens - before.decode_tokens == 60);
}

TEST_CASE("requests that wait for a slot do not keep others from guessing") {
  Setup setup;
  auto options = with_drafts(9);
  options.max_sequences = 1;
  auto engine = setup.engine(options);
  // The same prompt twice more: each follows the first, one after the other.
  run(*engine, setup.model, {make_request(1, 12, 60)});
  const auto before = engine->statistics();
  GenerationRequest again = make_request(1, 12, 60), last = again;
  last.tag = 1;
  engine->submit(std::move(again));
  engine->submit(std::move(last));
  while (engine->busy()) engine->step(setup.model.parameters().weights(), 0);
  CHECK(engine->statistics().steps - before.steps <= 40);
}

TEST_CASE("guesses that promise less than they cost are not made") {
  Setup setup;
  auto options = with_drafts(9);
  options.draft_row_cost = 1;  // a row would have to bring a whole token
  auto engine = setup.engine(options);
  const std::vector<GenerationRequest> requests = {make_request(1, 12, 40)};
  for (int round = 0; round < 2; ++round) run(*engine, setup.model, requests);
  CHECK(engine->statistics().draft_tokens == 0);
}

TEST_CASE("with guesses, stop strings, tools, choices, forced ends and recorded extras stay what they are") {
  Setup setup;
  std::vector<GenerationRequest> requests;
  const auto text = setup.greedy_continuation(make_request(3, 9, 1).prompt, 12);
  for (int copy = 0; copy < 2; ++copy) {
    const auto id = static_cast<PromptId>(copy);
    auto stops = greedy(make_request(3, 9, 40));
    stops.prompt_id = 10 + id;
    stops.stop.strings = {setup.model.tokenizer().token_bytes(text[5]) +
                          setup.model.tokenizer().token_bytes(text[6])};
    requests.push_back(stops);
    auto tool = greedy(make_request(3, 9, 30));
    tool.prompt_id = 20 + id;
    tool.turns =
        std::make_shared<InlineHandler>(setup.model.tokenizer().token_bytes(text[3]), [](std::string_view) {
          return std::vector<TokenId>{65, 66, 67};
        });
    requests.push_back(tool);
    auto choice = make_request(3, 9, 10);
    choice.prompt_id = 30 + id;
    choice.constraint.choices = {{1, 2, 3}, {1, 2, 4}, {7}};
    requests.push_back(choice);
    auto forced = make_request(3, 9, 15);
    forced.prompt_id = 40 + id;
    forced.stop.forced_last = 9;
    forced.output = {.raw_logprobs = true, .entropies = true, .top_logprobs = 3};
    requests.push_back(forced);
  }
  const auto plain = run(*setup.engine({}), setup.model, requests);
  auto engine = setup.engine(with_drafts(64));
  for (int round = 0; round < 3; ++round) {
    const auto samples = run(*engine, setup.model, requests);
    for (const auto& [key, sample] : samples) {
      check_equal(sample, plain.at(key));
      CHECK(sample.raw_logprobs == plain.at(key).raw_logprobs);
      CHECK(sample.entropies == plain.at(key).entropies);
      CHECK(sample.top_logprobs.size() == plain.at(key).top_logprobs.size());
    }
  }
  CHECK(engine->statistics().accepted_drafts > 0);
}

TEST_CASE("states handed to the trainer are those of plain decoding when tokens were guessed") {
  Setup setup;
  RolloutEngineOptions plain_options;
  plain_options.trunk_layers = 1;
  auto options = with_drafts(16);
  options.trunk_layers = 1;
  const std::vector<GenerationRequest> requests = {make_request(1, 12, 40), make_request(2, 5, 33)};
  const auto plain = run(*setup.engine(plain_options), setup.model, requests);
  auto engine = setup.engine(options);
  for (int round = 0; round < 2; ++round)
    for (const auto& [key, sample] : run(*engine, setup.model, requests)) {
      check_equal(sample, plain.at(key));
      REQUIRE(!sample.trunk.empty());
      CHECK(sample.trunk == plain.at(key).trunk);
    }
  CHECK(engine->statistics().accepted_drafts > 20);
}

#include "reward/scoring/composition.h"

#include <cmath>
#include <functional>

#include "rlhf/core/error.h"
#include "tests/catch.h"

namespace rlhf {
namespace {

class FunctionTerm : public RewardTerm {
 public:
  FunctionTerm(std::string name, std::function<double(const ScoredSample&)> function)
      : name_(std::move(name)), function_(std::move(function)) {}
  std::string_view name() const override { return name_; }
  double score(const ScoredSample& scored) const override { return function_(scored); }

 private:
  std::string name_;
  std::function<double(const ScoredSample&)> function_;
};

std::unique_ptr<RewardTerm> term(std::string name, std::function<double(const ScoredSample&)> function) {
  return std::make_unique<FunctionTerm>(std::move(name), std::move(function));
}

double length_of(const ScoredSample& scored) {
  return static_cast<double>(scored.text.size());
}

TEST_CASE("the total is the weighted sum of clipped terms") {
  RewardComposition composition;
  composition.add(term("length", length_of), {.weight = 0.5, .clip_min = 0, .clip_max = 3});
  composition.add(term("constant", [](const ScoredSample&) { return -2.0; }), {.weight = 2});
  CHECK(composition.names() == std::vector<std::string>{"length", "constant"});
  const Prompt prompt;
  const Sample sample;
  std::vector<Score> scores;
  for (const char* text : {"a", "abcde"}) scores.push_back(composition.score({prompt, sample, text}));
  CHECK(scores[0].total == 0.5 * 1 - 4);
  CHECK(scores[1].total == 0.5 * 3 - 4);
  CHECK(scores[1].terms == std::vector<double>{5, -2});

  const auto statistics = composition.summarise(scores);
  REQUIRE(statistics.size() == 2);
  CHECK(statistics[0].name == "length");
  CHECK(statistics[0].mean == 3);
  CHECK(statistics[0].stddev == 2);
  CHECK(statistics[0].min == 1);
  CHECK(statistics[0].max == 5);
  CHECK(statistics[0].clipped == 0.5);
  CHECK(statistics[0].share == Approx(2.0 / 10));
  CHECK(statistics[1].share == Approx(8.0 / 10));
  CHECK(composition.summarise({})[0].mean == 0);
}

TEST_CASE("a term that throws or is not finite names itself and the prompt") {
  Prompt prompt;
  prompt.id = 42;
  prompt.task = "view";
  Sample sample;
  sample.sample_index = 3;
  const auto error_of = [&](std::function<double(const ScoredSample&)> function) {
    RewardComposition composition;
    composition.add(term("mine", std::move(function)), {});
    try {
      composition.score({prompt, sample, ""});
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string("no error");
  };
  CHECK(error_of([](const ScoredSample&) -> double { throw std::runtime_error("no answer"); }) ==
        "reward term \"mine\", prompt 42 (view), sample 3: no answer");
  CHECK_THAT(error_of([](const ScoredSample&) { return NAN; }), ContainsSubstring("the score is nan"));
  CHECK_THAT(error_of([](const ScoredSample&) { return INFINITY; }),
             ContainsSubstring("expected a finite number"));
}

TEST_CASE("terms and weights are checked when they are added") {
  RewardComposition composition;
  composition.add(term("a", length_of), {});
  CHECK_THROWS_WITH(composition.add(term("a", length_of), {}),
                    ContainsSubstring("two terms are called \"a\""));
  CHECK_THROWS_WITH(composition.add(nullptr, {}), ContainsSubstring("missing"));
  CHECK_THROWS_WITH(composition.add(term("b", length_of), {.weight = NAN}),
                    ContainsSubstring("weight is nan, expected a finite number"));
  CHECK_THROWS_WITH(composition.add(term("b", length_of), {.clip_min = 2, .clip_max = 1}),
                    ContainsSubstring("expected clip_min <= clip_max, got 2 and 1"));
  CHECK_THROWS_AS(composition.add(term("b", length_of), {.clip_min = NAN, .clip_max = 1}), InvalidArgument);
  CHECK_THROWS_WITH(composition.add(term("b", length_of), {.schedule = {{5, 1}, {5, 2}}}),
                    ContainsSubstring("5 comes after 5"));
  CHECK_THROWS_WITH(composition.add(term("b", length_of), {.schedule = {{1, NAN}}}),
                    ContainsSubstring("point 0 is not finite"));
  CHECK_THROWS_WITH(composition.add(term("b", length_of), {.gate = TermGate{"a", NAN}}),
                    ContainsSubstring("must be finite"));
  CHECK_THROWS_WITH(composition.add(term("total", length_of), {}),
                    ContainsSubstring("cannot be called \"total\""));
  composition.add(term("total", length_of), {.name = "again"});
  CHECK(composition.names() == std::vector<std::string>{"a", "again"});
}

TEST_CASE("a term whose gate is closed counts what the gate says") {
  RewardComposition composition;
  // The gate looks at the raw score, though the other term is clipped and weighs nothing.
  composition.add(term("constant", [](const ScoredSample&) { return 7.0; }),
                  {.weight = 2, .clip_max = 3, .gate = TermGate{"length", 4, -1}});
  composition.add(term("length", length_of), {.weight = 0, .clip_max = 1});
  const Prompt prompt;
  const Sample sample;
  std::vector<Score> scores;
  for (const char* text : {"abc", "abcd", "", "abcde"})
    scores.push_back(composition.score({prompt, sample, text}));
  std::vector<double> totals;
  for (const Score& score : scores) totals.push_back(score.total);
  CHECK(totals == std::vector<double>{-2, 6, -2, 6});
  CHECK(scores[0].terms == std::vector<double>{7, 3});
  CHECK(scores[0].values == std::vector<double>{-1, 1});
  const auto statistics = composition.summarise(scores);
  CHECK(statistics[0].gated == 0.5);
  CHECK(statistics[0].clipped == 0.5);  // a closed gate clips nothing
  CHECK(statistics[0].mean == 7);
  CHECK(statistics[1].gated == 0);
  CHECK(statistics[0].share == 1);
}

TEST_CASE("a gate needs another term that is there") {
  const auto error_of = [](const std::string& name, bool other) {
    RewardComposition composition;
    composition.add(term("a", length_of), {.gate = TermGate{name}});
    if (other) composition.add(term("b", length_of), {});
    try {
      composition.check();
    } catch (const InvalidArgument& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  CHECK(error_of("b", true).empty());
  CHECK_THAT(error_of("c", true),
             ContainsSubstring("gate.term is \"c\", expected another term; there are \"b\""));
  CHECK_THAT(error_of("a", true), ContainsSubstring("expected another term"));
  CHECK_THAT(error_of("b", false), ContainsSubstring("there is none"));
}

TEST_CASE("the weight of a term follows its schedule, and evaluation does not") {
  RewardComposition composition;
  composition.add(term("length", length_of), {.weight = 3, .schedule = {{2, 1}, {6, 0}, {7, 0}, {8, -2}}});
  const std::vector<double> expected = {3, 3, 2.25, 1.5, 0.75, 0, 0, -6, -6};  // iterations 1 to 9
  for (std::int64_t i = 1; i <= 9; ++i) {
    INFO(i);
    CHECK(composition.weight(0, i) == Approx(expected[static_cast<std::size_t>(i - 1)]));
    CHECK(composition.score({{}, {}, "ab"}, i).total ==
          Approx(2 * expected[static_cast<std::size_t>(i - 1)]));
  }
  CHECK(composition.weight(0, {}) == 3);
  CHECK(composition.score({{}, {}, "ab"}).total == 6);
}

}  // namespace
}  // namespace rlhf

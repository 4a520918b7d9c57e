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
  composition.add(term("length", length_of), {0.5, 0, 3});
  composition.add(term("constant", [](const ScoredSample&) { return -2.0; }), {2});
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
  CHECK_THROWS_WITH(composition.add(term("b", length_of), {NAN}),
                    ContainsSubstring("weight nan is not finite"));
  CHECK_THROWS_WITH(composition.add(term("b", length_of), {1, 2, 1}), ContainsSubstring("clip_min 2"));
  CHECK_THROWS_AS(composition.add(term("b", length_of), {1, NAN, 1}), InvalidArgument);
}

}  // namespace
}  // namespace rlhf

#include "reward/rules/text_rules.h"

#include "reward/rules/numbers.h"
#include "rlhf/core/error.h"
#include "tests/catch.h"
#include "tests/reward/scored.h"

namespace rlhf {
namespace {

TEST_CASE("numbers in text") {
  using Numbers = std::vector<double>;
  CHECK(find_numbers("pay 1,250.50 or -3, not 7-5") == Numbers{1250.5, -3, 7, 5});
  CHECK(find_numbers("$.5 and 5. and 1,2 and 12,3456") == Numbers{0.5, 5, 1, 2, 12, 3456});
  CHECK(find_numbers("x2 Q3 10%-20%") == Numbers{2, 3, 10, 20});
  CHECK(find_numbers("-4") == Numbers{-4});
  CHECK(find_numbers("none").empty());
  CHECK(find_numbers(std::string(400, '9')).empty());
  CHECK(is_close(99.6, 100, 0.005, 0));
  CHECK_FALSE(is_close(99.4, 100, 0.005, 0));
  CHECK_FALSE(is_close(NAN, 1, 1, 1));
}

TEST_CASE("grounded numbers") {
  CHECK(numbers_are_grounded("1000*0.05*3", "1000 at 5% for 3 years"));
  CHECK(numbers_are_grounded("1000*1.05^3", "1000 at 5% for 3 years"));
  CHECK(numbers_are_grounded("1000*5/100/12", "1000 at 5%"));
  CHECK(numbers_are_grounded("no number", ""));
  CHECK_FALSE(numbers_are_grounded("1000*0.06", "1000 at 5%"));
  CHECK_FALSE(numbers_are_grounded("2", ""));
}

TEST_CASE("exact match normalises, and takes each form of reference") {
  const ExactMatch term;
  CHECK(score_of(term, " Lost  Card.\n", "\"lost card\"") == 1);
  CHECK(score_of(term, "lost", "\"lost card\"") == 0);
  CHECK(score_of(term, "b", "[\"a\", \"b\"]") == 1);
  CHECK(score_of(term, "5", "5") == 1);
  CHECK(score_of(term, "x", "{\"answer\": \"x\"}") == 1);
  CHECK(score_of(term, "x", "{\"label\": [\"x\"]}") == 1);
  CHECK_THROWS_WITH(score_of(term, "x", ""), ContainsSubstring("prompt 7: no reference"));
  CHECK_THROWS_WITH(score_of(term, "x", "{"), ContainsSubstring("prompt 7: the reference is not JSON"));
  CHECK_THROWS_WITH(score_of(term, "x", "{}"), ContainsSubstring("the reference holds object"));
}

TEST_CASE("word F1") {
  CHECK(word_f1("within 30 days", "30 days") == Approx(0.8));
  CHECK(word_f1("The, cat!", "the cat") == 1);
  CHECK(word_f1("a a", "a") == Approx(2.0 / 3));
  CHECK(word_f1("", "") == 1);
  CHECK(word_f1("x", "") == 0);
  CHECK(score_of(F1Match(), "30 days", "[\"never\", \"within 30 days\"]") == Approx(0.8));
}

TEST_CASE("the last number counts, within tolerance") {
  const NumberMatch term({0.005, 1e-9});
  CHECK(score_of(term, "2 * 500 = 1,000", "1000") == 1);
  CHECK(score_of(term, "1004.9", "{\"value\": 1000}") == 1);
  CHECK(score_of(term, "1005.1", "1000") == 0);
  CHECK(score_of(term, "none", "1000") == 0);
  CHECK(score_of(term, "12", "\"#### 12\"") == 1);
  CHECK_THROWS_WITH(score_of(term, "1", "\"many\""), ContainsSubstring("holds no number"));
}

TEST_CASE("regular expressions") {
  CHECK(RegexMatch("^(yes|no)$").matches("yes"));
  CHECK_FALSE(RegexMatch("^(yes|no)$").matches("yes, sir"));
  CHECK(RegexMatch("\\p{Lu}").matches("ü Ü"));
  CHECK_FALSE(RegexMatch(".").matches("\xff"));
  CHECK_FALSE(RegexMatch("^(a+)+$").matches(std::string(5000, 'a') + "b"));
  CHECK_THROWS_WITH(RegexMatch("a("),
                    ContainsSubstring("regular expression a(") && ContainsSubstring("offset 2"));
  CHECK(score_of(RegexMatch("b"), "abc", "") == 1);
}

TEST_CASE("format demands are counted") {
  const FormatRule term({"<calc>", "</calc>", 1, {}});
  CHECK(score_of(term, "<calc>1</calc>", "") == 1);
  CHECK(score_of(term, "<calc>1</calc>\n", "") == Approx(1.0 / 3));
  CHECK(score_of(term, "1", "") == Approx(1.0 / 3));
  const FormatRule order({"", "", 0, {"<think>", "</think>", "<answer>"}});
  CHECK(score_of(order, "<think>a</think><answer>", "") == 1);
  CHECK(score_of(order, "</think><think><answer>", "") == Approx(2.0 / 3));
  CHECK(score_of(order, "<think><think></think>", "") == Approx(1.0 / 3));
  CHECK_THROWS_AS(FormatRule({}), ConfigError);
}

TEST_CASE("length penalty counts chosen tokens only") {
  const LengthRule term({2, 4, 2});
  const auto score = [&](std::vector<std::uint8_t> mask) {
    Prompt prompt;
    Sample sample;
    sample.mask = std::move(mask);
    return term.score({prompt, sample, ""});
  };
  CHECK(score({1, 1, 1}) == 0);
  CHECK(score({1, 0, 0, 0}) == -0.5);
  CHECK(score({1, 1, 1, 1, 0, 0, 1}) == -0.5);
  CHECK(score(std::vector<std::uint8_t>(50, 1)) == -1);
  CHECK_THROWS_WITH(LengthRule({3, 2, 1}), ContainsSubstring("min_tokens 3 is above max_tokens 2"));
  CHECK_THROWS_AS(LengthRule({1, 2, 0}), ConfigError);
}

}  // namespace
}  // namespace rlhf

#include "reward/rules/finance_rules.h"

#include <nlohmann/json.hpp>

#include "rlhf/core/error.h"
#include "rlhf/data/calculator.h"
#include "tests/catch.h"
#include "tests/reward/scored.h"

namespace rlhf::finance {
namespace {

double score_case(const Case& item, const std::string& text) {
  return score_of(FinanceReward(), text, item.reference, to_string(item.kind));
}

TEST_CASE("intent and view") {
  const auto intent = [](const char* text) {
    return score_of(FinanceReward(), text, R"({"label":"fee"})", "intent");
  };
  CHECK(intent("fee") == 1);
  CHECK(intent(" fee.\n") == 1);
  CHECK(intent("refund") == 0.1);
  CHECK(intent("Fee") == 0);
  CHECK(intent("fee refund") == 0);
  CHECK(intent("") == 0);
  const auto view = [](const char* text) {
    return score_of(FinanceReward(), text, R"({"label":"bullish"})", "view");
  };
  CHECK(view("bullish") == 1);
  CHECK(view("bearish") == 0);
}

TEST_CASE("gate") {
  const auto gate = [](const char* text, const char* reference) {
    return score_of(FinanceReward(), text, reference, "gate");
  };
  const char* ok = R"({"verdict":"OK"})";
  const char* risky = R"({"verdict":"REFUSE","reason":"fraud"})";
  CHECK(gate("OK", ok) == 1);
  CHECK(gate("OFFTOPIC", ok) == 0);
  CHECK(gate("REFUSE: fraud", ok) == -0.5);
  CHECK(gate("REFUSE", R"({"verdict":"OFFTOPIC"})") == -0.5);
  CHECK(gate("REFUSE: fraud", risky) == 1);
  CHECK(gate("REFUSE: fees", risky) == 0);
  CHECK(gate("OK", risky) == 0);
}

TEST_CASE("calculation: value, partial credit, factuality") {
  const auto score = [](const char* text) {
    return score_of(FinanceReward(), text, R"({"value":3000,"evidence":"100000 at 1.5% for 2 years"})",
                    "calculation");
  };
  CHECK(score("<calc>100000*0.015*2</calc>") == 1);
  CHECK(score("<calc>100000*1.5/100*2</calc>=3000") == 1);
  CHECK(score("<calc>100000*1.5/100*2</calc>=3000 So 3,000.") == 1);
  CHECK(score("<calc>100000*1.5/100</calc>=1500") == 0.1);
  CHECK(score("<calc>3000</calc>") == 0);                            // not in the evidence
  CHECK(score("<calc>3000*1</calc>=3000") == 0);                     // its own result is no evidence for it
  CHECK(score("<calc>100000*1.5/100*2</calc>=3000, or 4000") == 0);  // neither
  CHECK(score("<calc>100000*(</calc>") == 0);
  CHECK(score("100000*1.5/100*2") == 0);
  CHECK(score("") == 0);
}

TEST_CASE("clause: F1, and no invented numbers") {
  const auto score = [](const char* text) {
    return score_of(FinanceReward(), text,
                    R"({"answer":"within 30 days","evidence":"File within 30 days or lose 5%."})", "clause");
  };
  CHECK(score("within 30 days") == 1);
  CHECK(score("Within 30 days.") == 1);
  CHECK(score("30 days") == Approx(0.8));
  CHECK(score("5%") == 0);
  CHECK(score("within 40 days") == 0);
  CHECK(score("File within 30 days or lose 5%.") == Approx(0.6));
}

TEST_CASE("a reference without its keys is an error that names prompt and key") {
  CHECK_THROWS_WITH(score_of(FinanceReward(), "x", "{}", "intent"),
                    ContainsSubstring("prompt 7 (intent)") && ContainsSubstring("lacks \"label\""));
  CHECK_THROWS_WITH(score_of(FinanceReward(), "x", "", "intent"), ContainsSubstring("no JSON object"));
  CHECK_THROWS_WITH(score_of(FinanceReward(), "x", "{}", "sums"), ContainsSubstring("no task kind"));
}

TEST_CASE("gold answers score 1 and are well formed; every corruption scores less") {
  for (const Kind kind : kAllKinds) {
    for (const Split split : {Split::kTrain, Split::kHeldOut}) {
      for (const Case& item : make_cases(kind, split, 300, 3)) {
        INFO(item.question << " -> " << item.answer);
        CHECK(score_case(item, item.answer) == 1);
        CHECK(is_well_formed(kind, item.answer));
        const auto wrong = corruptions(item, 3);
        CHECK(wrong.size() >= 2);
        for (const Corruption& corruption : wrong) {
          INFO(corruption.type << ": " << corruption.text);
          CHECK(corruption.text != item.answer);
          CHECK(score_case(item, corruption.text) < 1);
        }
      }
    }
  }
}

TEST_CASE("the gold value is what the calculator makes of the gold expression") {
  for (const Case& item : make_cases(Kind::kCalculation, Split::kTrain, 1000, 4)) {
    const auto reference = nlohmann::json::parse(item.reference);
    const Calculation result = calculate(reference["expression"].get<std::string>());
    INFO(item.answer << " " << result.error);
    REQUIRE(result.value);
    CHECK(*result.value == Approx(reference["value"].get<double>()).epsilon(1e-12));
  }
}

TEST_CASE("well-formed answers") {
  CHECK(is_well_formed(Kind::kIntent, "refund"));
  CHECK_FALSE(is_well_formed(Kind::kIntent, "money back"));
  CHECK(is_well_formed(Kind::kGate, "REFUSE: fees"));
  CHECK_FALSE(is_well_formed(Kind::kGate, "REFUSE"));
  CHECK_FALSE(is_well_formed(Kind::kGate, "REFUSE: whatever"));
  CHECK(is_well_formed(Kind::kCalculation, "<calc>1+1</calc>=2"));
  CHECK_FALSE(is_well_formed(Kind::kCalculation, "<calc>1+</calc>"));
  CHECK_FALSE(is_well_formed(Kind::kCalculation, "<calc>1</calc><calc>1</calc>"));
  CHECK(is_well_formed(Kind::kClause, "30 days"));
  CHECK_FALSE(is_well_formed(Kind::kClause, "30\ndays"));
  CHECK_FALSE(is_well_formed(Kind::kClause, " "));
  CHECK(is_well_formed(Kind::kView, "neutral"));
}

}  // namespace
}  // namespace rlhf::finance

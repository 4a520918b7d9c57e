#include "rlhf/data/finance_desk/desk.h"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "reward/rules/numbers.h"
#include "rlhf/core/error.h"
#include "rlhf/data/records.h"
#include "tests/catch.h"
#include "tests/data/temporary_folder.h"

namespace rlhf::finance {
namespace {

constexpr std::size_t kTrainCases = 1200;
constexpr std::size_t kHeldOutCases = 300;

std::set<std::string> questions_of(const std::vector<Case>& cases) {
  std::set<std::string> out;
  for (const Case& item : cases) out.insert(item.question);
  return out;
}

std::vector<std::string> common(const std::set<std::string>& a, const std::set<std::string>& b) {
  std::vector<std::string> out;
  std::set_intersection(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(out));
  return out;
}

TEST_CASE("every kind has at least 40 templates, and the splits share none") {
  for (const Kind kind : kAllKinds) {
    INFO(to_string(kind));
    const auto train = template_ids(kind, Split::kTrain), held_out = template_ids(kind, Split::kHeldOut);
    CHECK(train.size() + held_out.size() >= 40);
    CHECK(held_out.size() >= 10);
    const std::set<std::string> train_set(train.begin(), train.end()),
        held_out_set(held_out.begin(), held_out.end());
    CHECK(train_set.size() == train.size());
    CHECK(common(train_set, held_out_set).empty());
  }
}

TEST_CASE("cases are seeded, different from one another, and use the templates of their split only") {
  for (const Kind kind : kAllKinds) {
    INFO(to_string(kind));
    const auto train = make_cases(kind, Split::kTrain, kTrainCases, 1);
    const auto held_out = make_cases(kind, Split::kHeldOut, kHeldOutCases, 1);
    CHECK(questions_of(train).size() == kTrainCases);
    CHECK(questions_of(held_out).size() == kHeldOutCases);
    CHECK(common(questions_of(train), questions_of(held_out)).empty());
    CHECK(questions_of(make_cases(kind, Split::kTrain, kTrainCases, 1)) == questions_of(train));
    CHECK(questions_of(make_cases(kind, Split::kTrain, kTrainCases, 2)) != questions_of(train));
    const auto ids = template_ids(kind, Split::kHeldOut);
    std::set<std::string> used;
    for (const Case& item : held_out) used.insert(item.template_id);
    CHECK(used == std::set<std::string>(ids.begin(), ids.end()));
    std::set<PromptId> prompt_ids;
    for (const Case& item : train) prompt_ids.insert(item.id);
    for (const Case& item : held_out) prompt_ids.insert(item.id);
    CHECK(prompt_ids.size() == kTrainCases + kHeldOutCases);
  }
}

TEST_CASE("half of the templates: every answer class of the training cases is still there") {
  for (const Kind kind : kAllKinds) {
    INFO(to_string(kind));
    const auto all = template_ids(kind, Split::kTrain),
               half = template_ids(kind, Split::kTrain, Templates::kHalf);
    CHECK(2 * half.size() <= all.size() + 2);
    CHECK(2 * half.size() + 2 >= all.size());
    // intent/refund/3 -> intent/refund; a clause is a class of its own.
    const auto classes = [](const std::vector<std::string>& ids) {
      std::set<std::string> out;
      for (const std::string& id : ids) out.insert(id.substr(0, id.rfind('/')));
      return out;
    };
    if (kind != Kind::kClause) CHECK(classes(half) == classes(all));
    const std::set<std::string> allowed(half.begin(), half.end());
    for (const Case& item : make_cases(kind, Split::kTrain, 300, 1, Templates::kHalf))
      CHECK(allowed.count(item.template_id) == 1);
  }
}

TEST_CASE("amounts of held-out cases do not occur in training cases") {
  std::set<double> train_numbers;
  const auto is_amount = [](double number) { return number >= 200 && number != 365; };
  for (const Kind kind : kAllKinds) {
    for (const Case& item : make_cases(kind, Split::kTrain, kTrainCases, 1)) {
      for (const double number : find_numbers(item.question)) train_numbers.insert(number);
    }
  }
  std::size_t checked = 0;
  for (const Kind kind : kAllKinds) {
    for (const Case& item : make_cases(kind, Split::kHeldOut, kHeldOutCases, 1)) {
      for (const double number : find_numbers(item.question)) {
        if (!is_amount(number)) continue;
        INFO(item.question);
        CHECK(train_numbers.count(number) == 0);
        ++checked;
      }
    }
  }
  CHECK(checked > 300);
}

TEST_CASE("questions and answers are short, slots are filled, the instruction is constant") {
  for (const Kind kind : kAllKinds) {
    for (const Split split : {Split::kTrain, Split::kHeldOut}) {
      const auto cases = make_cases(kind, split, 300, 5);
      for (const Case& item : cases) {
        INFO(item.question << " -> " << item.answer);
        CHECK(item.question.size() <= 130);
        CHECK(item.answer.size() <= 60);
        CHECK((item.question + item.answer + item.reference).find("{amount") == std::string::npos);
        CHECK(item.question.find('{') == std::string::npos);
        CHECK(item.instruction == cases[0].instruction);
        CHECK(nlohmann::json::accept(item.reference));
      }
    }
  }
}

TEST_CASE("labels are spread as designed") {
  std::map<std::string, int> labels, verdicts, views;
  for (const Case& item : make_cases(Kind::kIntent, Split::kHeldOut, 300, 1)) ++labels[item.answer];
  for (const Case& item : make_cases(Kind::kGate, Split::kHeldOut, 300, 1))
    ++verdicts[item.answer.substr(0, item.answer.find(':'))];
  for (const Case& item : make_cases(Kind::kView, Split::kHeldOut, 300, 1)) ++views[item.answer];
  CHECK(intent_labels().size() == 15);
  CHECK(labels.size() == 15);
  for (const auto& [label, count] : labels) CHECK(count >= 6);
  CHECK(verdicts["REFUSE"] > 90);
  CHECK(verdicts["OK"] > 90);
  CHECK(verdicts["OFFTOPIC"] > 30);
  for (const auto& [label, count] : views) CHECK(count > 70);
}

TEST_CASE("a clause answer stands in its clause") {
  for (const Case& item : make_cases(Kind::kClause, Split::kTrain, 500, 1)) {
    INFO(item.question << " -> " << item.answer);
    CHECK(item.question.find(item.answer) != std::string::npos);
    const auto reference = nlohmann::json::parse(item.reference);
    CHECK(reference["distractor"] != item.answer);
  }
}

TEST_CASE("asking for more cases than the templates can make is an error") {
  CHECK_THROWS_WITH(make_cases(Kind::kIntent, Split::kHeldOut, 1000000, 1),
                    ContainsSubstring("asked for 1000000 different intent cases"));
  CHECK_THROWS_WITH(kind_from_string("poetry"), ContainsSubstring("no task kind \"poetry\""));
}

TEST_CASE("trivial baselines") {
  std::vector<Case> train(4);
  const char* answers[] = {"b", "b", "a long one", "a"};
  for (std::size_t i = 0; i < train.size(); ++i) train[i].answer = std::string(answers[i]);
  const auto baselines = trivial_baselines(train);
  REQUIRE(baselines.size() == 2);
  CHECK(baselines[0].answer == "b");
  CHECK(baselines[1].answer == "a long one");
  CHECK_THROWS_AS(trivial_baselines({}), InvalidArgument);
}

TEST_CASE("the files read back as records") {
  TemporaryFolder folder;
  const auto cases = make_cases(Kind::kCalculation, Split::kTrain, 20, 1);
  write_sft_jsonl(folder.path() / "sft.jsonl", cases);
  write_prompt_jsonl(folder.path() / "prompts.jsonl", cases);
  write_pair_jsonl(folder.path() / "pairs.jsonl", cases, 1);
  const auto sft = read_sft_records(folder.path() / "sft.jsonl", PromptText::kRaw);
  const auto prompts = read_prompt_records(folder.path() / "prompts.jsonl", PromptText::kRaw);
  const auto pairs = read_preference_pairs(folder.path() / "pairs.jsonl", PromptText::kRaw);
  REQUIRE(sft.size() == 20);
  REQUIRE(prompts.size() == 20);
  CHECK(pairs.size() == 20 * corruptions(cases[0], 1).size());
  CHECK(sft[3].messages.back().content == cases[3].answer);
  CHECK(sft[3].task == "calculation");
  CHECK(prompts[3].id == cases[3].id);
  CHECK(prompts[3].content.messages == cases[3].prompt());
  CHECK(nlohmann::json::parse(prompts[3].reference) == nlohmann::json::parse(cases[3].reference));
  CHECK(pairs[0].chosen.response == cases[0].answer);
  CHECK(pairs[0].chosen.prompt.messages == cases[0].prompt());
}

}  // namespace
}  // namespace rlhf::finance

#include "reward/rules/finance_rules.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <string>

#include "reward/rules/numbers.h"
#include "reward/rules/text_rules.h"
#include "rlhf/core/error.h"
#include "rlhf/data/calculator.h"

namespace rlhf::finance {
namespace {

using nlohmann::json;

constexpr double kPartialCredit = 0.1;
constexpr double kFalseRefusal = -0.5;
constexpr double kValueTolerance = 0.005;
constexpr std::size_t kMaxClauseWords = 16;
constexpr std::string_view kRefuse = "REFUSE";

std::string_view trim_answer(std::string_view text) {
  constexpr std::string_view kSpace = " \t\r\n";
  const std::size_t begin = text.find_first_not_of(kSpace);
  if (begin == std::string_view::npos) return "";
  text = text.substr(begin, text.find_last_not_of(kSpace) - begin + 1);
  if (text.back() == '.') text.remove_suffix(1);
  return text;
}

bool is_in(std::string_view text, const std::vector<std::string>& values) {
  return std::find(values.begin(), values.end(), text) != values.end();
}

json reference_of(const Prompt& prompt) {
  json reference = json::parse(prompt.reference, nullptr, false);
  RLHF_CHECK(reference.is_object(), "prompt ", prompt.id,
             ": the reference is no JSON object: ", prompt.reference);
  return reference;
}

const json& key_of(const Prompt& prompt, const json& reference, const char* key, json::value_t type) {
  const auto found = reference.find(key);
  const bool fits = found != reference.end() &&
                    (type == json::value_t::number_float ? found->is_number() : found->type() == type);
  RLHF_CHECK(fits, "prompt ", prompt.id, " (", prompt.task, "): the reference lacks \"", key,
             "\": ", prompt.reference);
  return *found;
}

std::string text_of(const Prompt& prompt, const json& reference, const char* key) {
  return key_of(prompt, reference, key, json::value_t::string).get<std::string>();
}

double score_intent(const ScoredSample& scored, const json& reference) {
  const std::string_view answer = trim_answer(scored.text);
  if (answer == text_of(scored.prompt, reference, "label")) return 1;
  return is_in(answer, intent_labels()) ? kPartialCredit : 0;
}

double score_gate(const ScoredSample& scored, const json& reference) {
  const std::string_view answer = trim_answer(scored.text);
  const std::string verdict = text_of(scored.prompt, reference, "verdict");
  const bool risky = verdict == kRefuse;
  const std::string gold = risky ? verdict + ": " + text_of(scored.prompt, reference, "reason") : verdict;
  if (answer == gold) return 1;
  return !risky && answer.substr(0, kRefuse.size()) == kRefuse ? kFalseRefusal : 0;
}

double score_calculation(const ScoredSample& scored, const json& reference) {
  const double gold = key_of(scored.prompt, reference, "value", json::value_t::number_float).get<double>();
  std::vector<double> evidence = find_numbers(text_of(scored.prompt, reference, "evidence"));
  const auto expression = find_calculation(scored.text);
  if (!expression) return 0;
  const Calculation calculation = calculate(*expression);
  if (!calculation.value) return 0;
  // Behind the tag the tool's result, as the tool writes it, is evidence as well; inside it is not.
  const auto close = static_cast<std::size_t>(expression->data() + expression->size() - scored.text.data());
  if (!numbers_are_grounded(scored.text.substr(0, close), evidence)) return 0;
  evidence.push_back(*calculation.value);
  for (const double number : find_numbers(tool_result(calculation))) evidence.push_back(number);
  if (!numbers_are_grounded(scored.text.substr(close), evidence)) return 0;
  return is_close(*calculation.value, gold, kValueTolerance, 0) ? 1 : kPartialCredit;
}

double score_clause(const ScoredSample& scored, const json& reference) {
  const std::string gold = text_of(scored.prompt, reference, "answer");
  const std::vector<double> evidence = find_numbers(text_of(scored.prompt, reference, "evidence"));
  for (const double number : find_numbers(scored.text)) {
    if (std::find(evidence.begin(), evidence.end(), number) == evidence.end()) return 0;
  }
  return word_f1(scored.text, gold);
}

double score_view(const ScoredSample& scored, const json& reference) {
  return trim_answer(scored.text) == text_of(scored.prompt, reference, "label") ? 1 : 0;
}

bool is_gate_answer(std::string_view answer) {
  if (answer == "OK" || answer == "OFFTOPIC") return true;
  constexpr std::string_view kPrefix = "REFUSE: ";
  return answer.substr(0, kPrefix.size()) == kPrefix && is_in(answer.substr(kPrefix.size()), gate_reasons());
}

bool is_one_calculation(std::string_view text) {
  const std::size_t open = text.find(kCalcOpen), close = text.find(kCalcClose);
  const bool once =
      open != std::string_view::npos && text.find(kCalcOpen, open + 1) == std::string_view::npos &&
      close != std::string_view::npos && text.find(kCalcClose, close + 1) == std::string_view::npos;
  const auto expression = find_calculation(text);
  return once && expression && calculate(*expression).value.has_value();
}

bool is_short_line(std::string_view text) {
  const std::string_view line = trim_answer(text);
  const auto spaces = static_cast<std::size_t>(std::count(line.begin(), line.end(), ' '));
  return !line.empty() && line.find('\n') == std::string_view::npos && spaces < kMaxClauseWords;
}

}  // namespace

double FinanceReward::score(const ScoredSample& scored) const {
  const json reference = reference_of(scored.prompt);
  switch (kind_from_string(scored.prompt.task)) {
    case Kind::kIntent:
      return score_intent(scored, reference);
    case Kind::kGate:
      return score_gate(scored, reference);
    case Kind::kCalculation:
      return score_calculation(scored, reference);
    case Kind::kClause:
      return score_clause(scored, reference);
    case Kind::kView:
      return score_view(scored, reference);
  }
  fail<InternalError>("finance reward: unknown kind");
}

bool is_well_formed(Kind kind, std::string_view text) {
  switch (kind) {
    case Kind::kIntent:
      return is_in(trim_answer(text), intent_labels());
    case Kind::kGate:
      return is_gate_answer(trim_answer(text));
    case Kind::kCalculation:
      return is_one_calculation(text);
    case Kind::kClause:
      return is_short_line(text);
    case Kind::kView:
      return is_in(trim_answer(text), view_labels());
  }
  return false;
}

}  // namespace rlhf::finance

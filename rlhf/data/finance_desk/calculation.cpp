#include <cmath>
#include <nlohmann/json.hpp>

#include "rlhf/core/error.h"
#include "rlhf/data/finance_desk/generator.h"

namespace rlhf::finance {
namespace {

enum class Operand { kMoney, kSmallMoney, kPercent, kYears, kShare, kRate };

using Operands = std::vector<double>;

// `{0}`, `{1}` ... stand for the operands, in the question and in the expression alike, so that the numbers
// of the expression are words of the question.
struct Formula {
  std::string name;
  std::vector<Operand> operands;
  std::string expression;
  double (*value)(const Operands& x);
  std::vector<std::string> train;
  std::string held_out;
};

const std::vector<Formula>& formulas() {
  using enum Operand;
  static const std::vector<Formula> all = {
      {"simple_interest",
       {kMoney, kPercent, kYears},
       "{0}*{1}/100*{2}",
       [](const Operands& x) { return x[0] * x[1] / 100 * x[2]; },
       {"Simple interest on {0} at {1}% for {2} years?",
        "You lend {0} at {1}% simple interest for {2} years. Interest?",
        "{0} earns {1}% a year, not compounded, for {2} years. Total interest?",
        "A loan of {0} at {1}% without compounding runs {2} years. Interest in all?",
        "What simple interest falls due on {0} at {1}% over {2} years?"},
       "How much simple interest do {0} bring in {2} years at {1}%?"},
      {"compound_growth",
       {kMoney, kPercent, kYears},
       "{0}*(1+{1}/100)^{2}",
       [](const Operands& x) { return x[0] * std::pow(1 + x[1] / 100, x[2]); },
       {"{0} grows {1}% a year, compounded, for {2} years. End value?",
        "Invest {0} at {1}% compound interest for {2} years. What is it worth?",
        "What do {0} become in {2} years at {1}% compounded yearly?",
        "{0} saved for {2} years at {1}% with interest on interest. Final sum?",
        "A deposit of {0} compounds at {1}% for {2} years. Final value?"},
       "Future value of {0} after {2} years with {1}% compound growth?"},
      {"present_value",
       {kMoney, kPercent, kYears},
       "{0}/(1+{1}/100)^{2}",
       [](const Operands& x) { return x[0] / std::pow(1 + x[1] / 100, x[2]); },
       {"You get {0} in {2} years. Value today at {1}%?", "Discount {0} due in {2} years at {1}%.",
        "What is {0} in {2} years worth now at a rate of {1}%?",
        "How much must I set aside today to have {0} in {2} years at {1}%?",
        "A bond pays {0} in {2} years. Price at a yield of {1}%?"},
       "Present value of {0} paid after {2} years, discount rate {1}%?"},
      {"annuity",
       {kSmallMoney, kPercent, kYears},
       "{0}*(1-(1+{1}/100)^-{2})/({1}/100)",
       [](const Operands& x) { return x[0] * (1 - std::pow(1 + x[1] / 100, -x[2])) / (x[1] / 100); },
       {"An annuity pays {0} a year for {2} years. Present value at {1}%?",
        "Present value of {2} yearly payments of {0} at {1}%?",
        "What is an annuity of {0} over {2} years worth today at {1}%?",
        "You receive {0} each year for {2} years. Worth today at {1}%?",
        "Rent of {0} a year for {2} years, rate {1}%. Present value?"},
       "Value today of {0} a year during {2} years, rate {1}%?"},
      {"margin",
       {kMoney, kMoney},
       "({0}-{1})/{0}*100",
       [](const Operands& x) { return (x[0] - x[1]) / x[0] * 100; },
       {"Revenue {0}, costs {1}. Profit margin in percent?",
        "Sales are {0} and costs {1}. Margin in percent?",
        "A shop sells for {0} and spends {1}. What percent is its margin?",
        "Turnover {0}, expenses {1}. Profit as a percentage of turnover?",
        "A firm earns {0} and its costs are {1}. Give the margin in percent."},
       "What is the margin in percent with income {0} and expenses {1}?"},
      {"cash_flow_ratio",
       {kMoney, kMoney},
       "{0}/{1}",
       [](const Operands& x) { return x[0] / x[1]; },
       {"Cash flow {0}, short-term debt {1}. Cash flow ratio?",
        "Operating cash is {0}, current debt {1}. Ratio?",
        "A firm has cash flow of {0} and owes {1} this year. Coverage ratio?",
        "How often does a cash flow of {0} cover debts of {1}?",
        "Cash from operations {0}, liabilities {1}. What is the ratio?"},
       "What is the cash flow ratio for {0} of cash flow over {1} of debt?"},
      {"weighted_cost",
       {kShare, kRate, kShare, kRate},
       "({0}*{1}+{2}*{3})/100",
       [](const Operands& x) { return (x[0] * x[1] + x[2] * x[3]) / 100; },
       {"{0}% equity at {1}% and {2}% debt at {3}%. Weighted cost in percent?",
        "Capital: {0}% shares costing {1}%, {2}% loans costing {3}%. Average cost?",
        "A firm funds {0}% at {1}% and {2}% at {3}%. What is its weighted rate?",
        "Money comes {0}% at {1}% and {2}% at {3}%. Mean cost?",
        "Weights {0}% and {2}%, costs {1}% and {3}%. WACC?"},
       "What does capital cost on average with {0}% at {1}% and {2}% at {3}%?"},
      {"premium",
       {kMoney, kRate},
       "{0}*{1}/100",
       [](const Operands& x) { return x[0] * x[1] / 100; },
       {"Insured sum {0}, premium rate {1}%. Premium?", "A policy for {0} costs {1}% a year. Yearly premium?",
        "What is the premium for cover of {0} at {1}%?",
        "You insure {0} at a rate of {1}%. What do you pay a year?",
        "Insure goods of {0} for {1}%. How much is that?"},
       "Cover of {0} is priced at {1}%. How much is the premium?"},
      {"deductible",
       {kMoney, kSmallMoney},
       "{0}-{1}",
       [](const Operands& x) { return x[0] - x[1]; },
       {"Loss {0}, deductible {1}. Payout?", "Damage of {0}, you bear the first {1}. What is paid?",
        "The claim is {0} and the deductible {1}. How much does the insurer pay?",
        "A loss of {0} happens and {1} stay with you. Insurer pays?",
        "Repair bill {0}, own share {1}. What does the insurance pay?"},
       "What does the policy pay for a loss of {0} with {1} deductible?"},
      {"coinsurance",
       {kMoney, kSmallMoney, kShare},
       "({0}-{1})*{2}/100",
       [](const Operands& x) { return (x[0] - x[1]) * x[2] / 100; },
       {"Loss {0}, deductible {1}, then {2}% is paid. Payout?",
        "After a deductible of {1} the insurer pays {2}% of {0}. Payout?",
        "Bill {0}; you pay the first {1}, the policy {2}% of the rest. Policy pays?",
        "Costs {0}, excess {1}, of the remainder {2}% is covered. Payout?",
        "Of a bill of {0} you carry {1}; {2}% of what is left is paid. Amount?"},
       "The policy covers {2}% above {1}. What does it pay for {0}?"},
      {"monthly_interest",
       {kMoney, kPercent},
       "{0}*{1}/100/12",
       [](const Operands& x) { return x[0] * x[1] / 100 / 12; },
       {"Loan of {0} at {1}% a year. Interest for one month?", "One month of interest on {0} at {1}% yearly?",
        "What interest falls due each month on {0} at {1}% a year?",
        "How much interest does {0} at {1}% a year cost per month?",
        "Interest of a single month on {0}, yearly rate {1}%?"},
       "A debt of {0} costs {1}% a year. How much interest per month?"},
      {"daily_interest",
       {kMoney, kPercent},
       "{0}*{1}/100/365",
       [](const Operands& x) { return x[0] * x[1] / 100 / 365; },
       {"Overdraft of {0} at {1}% a year. Interest per day?", "One day of interest on {0} at {1}% yearly?",
        "What does a balance of {0} earn a day at {1}% a year?", "Daily interest for {0} at a yearly {1}%?",
        "A credit of {0} at {1}% a year. Cost of one day?"},
       "How much interest accrues daily on {0} at {1}% a year?"},
      {"transfer_cost",
       {kMoney, kRate, kYears},
       "{0}*{1}/100+{2}",
       [](const Operands& x) { return x[0] * x[1] / 100 + x[2]; },
       {"Send {0} with a fee of {1}% plus {2}. Fee?",
        "A transfer of {0} costs {1}% and a fixed {2}. Total cost?",
        "You move {0}. The bank takes {1}% plus {2}. How much?",
        "Paying {0} abroad costs {1}% and {2} on top. What is the fee?",
        "For {0} the charge is {1}% and {2} more. Sum of charges?"},
       "What is the charge on {0} at {1}% plus a flat {2}?"},
      {"dividend_yield",
       {kSmallMoney, kMoney},
       "{0}/{1}*100",
       [](const Operands& x) { return x[0] / x[1] * 100; },
       {"Dividends {0} on shares worth {1}. Yield in percent?",
        "You hold {1} in stock and get {0} a year. Yield?",
        "Shares for {1} pay {0} in dividends. What percent is that?",
        "{0} a year from shares bought for {1}. Yield in percent?",
        "A stock position of {1} returns {0} in dividends. Yield?"},
       "What is the dividend yield of {0} paid on {1}?"},
  };
  return all;
}

std::string draw_operand(Operand operand, Split split, RandomStream& random) {
  switch (operand) {
    case Operand::kMoney:
      return std::to_string(draw_number(random, split, {40, 999, 100}));
    case Operand::kSmallMoney:
      return std::to_string(draw_number(random, split, {2, 60, 50}));
    case Operand::kPercent:
      return std::to_string(draw_number(random, split, {2, 15, 1}));
    // Years and fixed fees are too few to be split.
    case Operand::kYears:
      return std::to_string(2 + random.below(8));
    case Operand::kShare:
      return std::to_string(draw_number(random, split, {2, 19, 5}));
    case Operand::kRate: {
      const std::uint64_t tenths = draw_number(random, split, {11, 99, 1});
      return concat(tenths / 10, tenths % 10 == 0 ? "" : concat('.', tenths % 10));
    }
  }
  fail<InternalError>("finance desk: unknown operand");
}

// The values of a case must make sense beyond their ranges: costs below income, shares that add up to 100.
bool is_sensible(const Formula& formula, const Operands& x) {
  if (formula.name == "margin") return x[1] < x[0];
  if (formula.name == "dividend_yield") return x[0] < x[1];
  // A deductible within the tolerance of the reward could be left out unnoticed.
  if (formula.name == "deductible" || formula.name == "coinsurance") return x[1] < x[0] && x[1] > 0.02 * x[0];
  return true;
}

std::vector<std::string> draw_operands(const Formula& formula, Split split, RandomStream& random) {
  while (true) {
    std::vector<std::string> texts;
    Operands values;
    for (const Operand operand : formula.operands) {
      texts.push_back(draw_operand(operand, split, random));
      if (formula.name == "weighted_cost" && texts.size() == 3) {
        texts.back() = std::to_string(100 - std::stoi(texts.front()));
      }
      values.push_back(std::stod(texts.back()));
    }
    if (is_sensible(formula, values)) return texts;
  }
}

std::string substitute(const std::string& pattern, const std::vector<std::string>& texts) {
  std::string out;
  for (std::size_t i = 0; i < pattern.size(); ++i) {
    if (pattern[i] == '{') {
      out += texts.at(static_cast<std::size_t>(pattern[i + 1] - '0'));
      i += 2;
    } else {
      out += pattern[i];
    }
  }
  return out;
}

Operands values_of(const std::vector<std::string>& texts) {
  Operands values;
  for (const std::string& text : texts) values.push_back(std::stod(text));
  return values;
}

std::string in_tags(const std::string& expression) {
  return "<calc>" + expression + "</calc>";
}

std::string calculation_id(const Formula& formula, std::size_t number) {
  return concat("calculation/", formula.name, "/", number);
}

std::vector<std::string> calculation_template_ids(Split split) {
  std::vector<std::string> ids;
  for (const Formula& formula : formulas()) {
    const std::size_t count = formula.train.size();
    for (std::size_t i = 0; split == Split::kTrain && i < count; ++i)
      ids.push_back(calculation_id(formula, i));
    if (split == Split::kHeldOut) ids.push_back(calculation_id(formula, count));
  }
  return ids;
}

Draft draw_calculation(Split split, RandomStream& random) {
  const Formula& formula = pick(formulas(), random);
  const std::size_t number =
      split == Split::kHeldOut ? formula.train.size() : random.below(formula.train.size());
  const std::vector<std::string> texts = draw_operands(formula, split, random);
  const std::string question =
      substitute(split == Split::kHeldOut ? formula.held_out : formula.train[number], texts);
  const std::string expression = substitute(formula.expression, texts);
  const nlohmann::json reference{
      {"value", formula.value(values_of(texts))}, {"expression", expression}, {"evidence", question}};
  return {question, in_tags(expression), reference.dump(), calculation_id(formula, number)};
}

const Formula& formula_of(const Case& item) {
  for (const Formula& formula : formulas()) {
    if (item.template_id.rfind("calculation/" + formula.name + "/", 0) == 0) return formula;
  }
  fail<InternalError>("finance desk: unknown template ", item.template_id);
}

// Recovers the operands from the question, whose numbers are exactly those.
std::vector<std::string> operands_of(const Case& item, const Formula& formula) {
  const std::size_t number = std::stoul(item.template_id.substr(item.template_id.rfind('/') + 1));
  const std::string& pattern = number < formula.train.size() ? formula.train[number] : formula.held_out;
  std::vector<std::string> texts(formula.operands.size());
  std::size_t at = 0;
  for (std::size_t i = 0; i < pattern.size(); ++i, ++at) {
    if (pattern[i] != '{') continue;
    const std::size_t length = item.question.find_first_not_of("0123456789.", at) - at;
    std::string text = item.question.substr(at, length);
    at += length - 1;
    if (text.back() == '.') {
      text.pop_back();
      --at;
    }
    texts.at(static_cast<std::size_t>(pattern[i + 1] - '0')) = text;
    i += 2;
  }
  return texts;
}

// Changes one operand until the result differs by more than the tolerance of the reward.
std::string with_wrong_operand(const Formula& formula, std::vector<std::string> texts, RandomStream& random) {
  const double gold = formula.value(values_of(texts));
  for (std::uint64_t round = 0;; ++round) {
    std::vector<std::string> changed = texts;
    std::string& text = changed[random.below(changed.size())];
    // The first digit carries most of the value.
    text[0] = static_cast<char>('1' + random.below(9));
    const double value = formula.value(values_of(changed));
    if (std::abs(value - gold) > 0.02 * std::abs(gold))
      return in_tags(substitute(formula.expression, changed));
    if (round > 100)
      fail<InternalError>("finance desk: no wrong operand changes the result of ", formula.name);
  }
}

std::vector<Corruption> corrupt_calculation(const Case& item, RandomStream& random) {
  const Formula& formula = formula_of(item);
  const std::vector<std::string> texts = operands_of(item, formula);
  const std::string expression = substitute(formula.expression, texts);
  std::string swapped = expression;
  const std::size_t position = swapped.find_first_of("*/-");
  swapped[position] = '+';
  std::vector<Corruption> out;
  out.push_back({with_wrong_operand(formula, texts, random), "wrong_operand"});
  out.push_back({in_tags(swapped), "wrong_operator"});
  out.push_back({in_tags(texts[0]), "missing_factor"});
  out.push_back({"<calc>" + expression, "malformed"});
  out.push_back({expression, "no_tool"});
  return out;
}

}  // namespace

KindSource calculation_source() {
  return {"Calculate with the tool.", calculation_template_ids, draw_calculation, corrupt_calculation};
}

}  // namespace rlhf::finance

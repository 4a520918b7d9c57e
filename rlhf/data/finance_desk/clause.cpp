#include <nlohmann/json.hpp>

#include "rlhf/core/error.h"
#include "rlhf/data/finance_desk/generator.h"

namespace rlhf::finance {
namespace {

struct Question {
  std::string text;
  std::string answer;  // a span of the clause
};

// A clause has two questions whose answers stand in it, so that the question must be read.
struct Clause {
  std::string text;
  std::vector<Question> questions;
};

constexpr std::size_t kNumHeldOut = 12;  // the last clauses of the list

const std::vector<Clause>& clauses() {
  static const std::vector<Clause> all = {
      {"Claims must be filed within {days} days; late claims lose {percent}% of the payout.",
       {{"By when must I claim?", "within {days} days"},
        {"What do late claims lose?", "{percent}% of the payout"}}},
      {"The policy pays up to {limit} for theft and up to {limit2} for fire.",
       {{"Limit for theft?", "{limit}"}, {"Limit for fire?", "{limit2}"}}},
      {"You may cancel in the first {days} days; after that the fee is {amount}.",
       {{"How long can I cancel for free?", "{days} days"}, {"What is the fee later?", "{amount}"}}},
      {"Cover starts {days} days after signing and ends at age {age}.",
       {{"When does cover start?", "{days} days after signing"}, {"When does cover end?", "at age {age}"}}},
      {"Damage by {peril} is insured; damage by {peril2} is excluded.",
       {{"What is insured?", "Damage by {peril}"}, {"What is excluded?", "damage by {peril2}"}}},
      {"The loan of {sum} is repaid over {months} months.",
       {{"How much is the loan?", "{sum}"}, {"How long is it repaid?", "over {months} months"}}},
      {"Withdrawals above {sum} need a notice of {days} days.",
       {{"Which withdrawals need notice?", "above {sum}"}, {"How long is the notice?", "{days} days"}}},
      {"The insurer bears {percent}% of the repair, the client the first {amount}.",
       {{"What does the insurer bear?", "{percent}% of the repair"},
        {"What does the client bear?", "the first {amount}"}}},
      {"Premiums are due {day}; a reminder costs {amount}.",
       {{"When are premiums due?", "{day}"}, {"What does a reminder cost?", "{amount}"}}},
      {"The fund holds {percent}% shares, mostly from {country}.",
       {{"How much is in shares?", "{percent}%"}, {"Where are the shares from?", "{country}"}}},
      {"{fund} charges {percent}% on entry and nothing on exit.",
       {{"Charge on entry?", "{percent}%"}, {"Charge on exit?", "nothing"}}},
      {"The card works in {country} up to {sum} a day.",
       {{"Where does the card work?", "{country}"}, {"What is the daily limit?", "{sum}"}}},
      {"Interest of {percent}% is paid on balances below {sum}.",
       {{"What interest is paid?", "{percent}%"}, {"On which balances?", "below {sum}"}}},
      {"Trips longer than {days} days are insured only with form {amount}.",
       {{"Which trips need a form?", "longer than {days} days"}, {"Which form is it?", "form {amount}"}}},
      {"Goods of {person} are insured up to {limit} in the home.",
       {{"Whose goods are insured?", "Goods of {person}"}, {"Up to what sum?", "{limit}"}}},
      {"The rate is fixed for {months} months, then it rises by {percent}%.",
       {{"How long is the rate fixed?", "{months} months"}, {"How much does it rise?", "by {percent}%"}}},
      {"Drivers under {age} pay an extra {amount}.",
       {{"Who pays extra?", "Drivers under {age}"}, {"How much extra?", "{amount}"}}},
      {"A doctor must confirm {illness} within {days} days.",
       {{"What must a doctor confirm?", "{illness}"}, {"In what time?", "within {days} days"}}},
      {"The guarantee for {thing} lasts {months} months.",
       {{"What is guaranteed?", "{thing}"}, {"How long is the guarantee?", "{months} months"}}},
      {"Rental cars are paid for {days} days at most, taxis up to {amount}.",
       {{"How long are rental cars paid?", "{days} days at most"}, {"Limit for taxis?", "{amount}"}}},
      {"Payments to {country} take {days} days and cost {amount}.",
       {{"How long do payments take?", "{days} days"}, {"What do they cost?", "{amount}"}}},
      {"The bonus is {percent}% after {months} months without a claim.",
       {{"How high is the bonus?", "{percent}%"},
        {"When is it paid?", "after {months} months without a claim"}}},
      {"{company} pays a dividend of {amount} in {country}.",
       {{"Who pays the dividend?", "{company}"}, {"How much is it?", "{amount}"}}},
      {"Tenants are liable for {peril}, owners for {peril2}.",
       {{"What are tenants liable for?", "{peril}"}, {"What are owners liable for?", "{peril2}"}}},
      {"Students pay {amount} a year, everyone else {amount2}.",
       {{"What do students pay?", "{amount}"}, {"What does everyone else pay?", "{amount2}"}}},
      {"The first {amount} of any loss are yours, the rest is paid within {days} days.",
       {{"What part is mine?", "The first {amount}"}, {"When is the rest paid?", "within {days} days"}}},
      {"Savings up to {sum} earn {percent}% a year.",
       {{"Which savings earn interest?", "up to {sum}"}, {"How much do they earn?", "{percent}% a year"}}},
      {"Letters go to the office in {city}, calls to {person}.",
       {{"Where do letters go?", "the office in {city}"}, {"Who takes calls?", "{person}"}}},
      {"{fund} may hold up to {percent}% in {currency}.",
       {{"How much may it hold?", "up to {percent}%"}, {"In which currency?", "{currency}"}}},
      {"Theft of {thing} is covered abroad for {days} days.",
       {{"What is covered abroad?", "Theft of {thing}"}, {"For how long?", "{days} days"}}},
      {"A missed payment costs {amount} and is reported after {days} days.",
       {{"What does a missed payment cost?", "{amount}"}, {"When is it reported?", "after {days} days"}}},
      {"Cover ends when {thing} is sold or after {months} months.",
       {{"What sale ends the cover?", "{thing}"}, {"After what time does it end?", "after {months} months"}}},
      {"Members from {country} get {percent}% off the premium.",
       {{"Who gets a discount?", "Members from {country}"},
        {"How large is it?", "{percent}% off the premium"}}},
      {"Cash can be drawn {day}, at most {amount}.",
       {{"When can cash be drawn?", "{day}"}, {"How much at most?", "{amount}"}}},
      {"Children are insured until age {age}, parents up to {limit}.",
       {{"Until when are children insured?", "age {age}"}, {"Limit for parents?", "{limit}"}}},
      {"The broker keeps {percent}% of the price, the seller gets the rest {day}.",
       {{"What does the broker keep?", "{percent}% of the price"},
        {"When does the seller get the rest?", "{day}"}}},
      {"Losses from {peril} need a report by the police in {city}.",
       {{"Which losses need a report?", "Losses from {peril}"}, {"Where are the police?", "{city}"}}},
      {"New clients get {amount} when they bring {sum}.",
       {{"What do new clients get?", "{amount}"}, {"What must they bring?", "{sum}"}}},
      {"The bank may close accounts with less than {amount} after {months} months.",
       {{"Which accounts may be closed?", "accounts with less than {amount}"},
        {"After what time?", "{months} months"}}},
      {"Shares of {company} are sold first, those of {company2} last.",
       {{"Which shares go first?", "Shares of {company}"}, {"Which go last?", "those of {company2}"}}},
      {"An expert sees {thing} within {days} days of the report.",
       {{"What does the expert see?", "{thing}"}, {"How soon?", "within {days} days"}}},
      {"Pensions start at age {age} and rise {percent}% a year.",
       {{"When do pensions start?", "at age {age}"}, {"How do they rise?", "{percent}% a year"}}},
      {"Costs above {sum} must be approved by {person}.",
       {{"Which costs need approval?", "Costs above {sum}"}, {"Who approves them?", "{person}"}}},
      {"For {illness} the wait is {months} months and the limit {limit}.",
       {{"How long is the wait?", "{months} months"}, {"What is the limit?", "{limit}"}}},
      // Held out from here on.
      {"Complaints are answered within {days} days; appeals cost {amount}.",
       {{"When are complaints answered?", "within {days} days"}, {"What do appeals cost?", "{amount}"}}},
      {"The policy covers {peril} up to {limit}, but not {peril2}.",
       {{"Up to what sum?", "{limit}"}, {"What is not covered?", "{peril2}"}}},
      {"The account pays {percent}% for the first {months} months.",
       {{"What does the account pay?", "{percent}%"}, {"For how long?", "the first {months} months"}}},
      {"Early repayment of more than {sum} costs {percent}% of the rest.",
       {{"Which repayments cost extra?", "more than {sum}"},
        {"What do they cost?", "{percent}% of the rest"}}},
      {"People over {age} wait {days} days for cover.",
       {{"Who has to wait?", "People over {age}"}, {"How long is the wait?", "{days} days"}}},
      {"Repairs of {thing} need two offers when they exceed {sum}.",
       {{"What needs two offers?", "Repairs of {thing}"}, {"From which sum?", "{sum}"}}},
      {"Orders in {currency} are settled after {days} days.",
       {{"Which orders are meant?", "Orders in {currency}"},
        {"When are they settled?", "after {days} days"}}},
      {"Cash from {city} is accepted up to {amount} a month.",
       {{"Which cash is accepted?", "Cash from {city}"}, {"Up to what sum?", "{amount}"}}},
      {"Fines of {amount} are added if the form is late by {days} days.",
       {{"How high are the fines?", "{amount}"}, {"How late is the form?", "{days} days"}}},
      {"The credit line of {sum} is reviewed every {months} months.",
       {{"How large is the credit line?", "{sum}"}, {"How often is it reviewed?", "every {months} months"}}},
      {"Loss of {thing} is paid, damage by {peril} is not.",
       {{"What is paid?", "Loss of {thing}"}, {"What is not paid?", "damage by {peril}"}}},
      {"Investors from {country} wait {days} days for their money.",
       {{"Who waits?", "Investors from {country}"}, {"How long do they wait?", "{days} days"}}},
  };
  return all;
}

std::size_t first_clause(Split split) {
  return split == Split::kHeldOut ? clauses().size() - kNumHeldOut : 0;
}
std::size_t end_clause(Split split) {
  return split == Split::kHeldOut ? clauses().size() : clauses().size() - kNumHeldOut;
}

std::vector<std::string> clause_template_ids(Split split) {
  std::vector<std::string> ids;
  for (std::size_t i = first_clause(split); i < end_clause(split); ++i) {
    for (std::size_t q = 0; q < clauses()[i].questions.size(); ++q)
      ids.push_back(concat("clause/", i, "/", q));
  }
  return ids;
}

Draft draw_clause(Split split, RandomStream& random) {
  const std::size_t number = first_clause(split) + random.below(end_clause(split) - first_clause(split));
  const Clause& clause = clauses()[number];
  const std::size_t asked = random.below(clause.questions.size());
  SlotFiller filler(random, split);
  const std::string text = filler.fill(clause.text);
  const std::string answer = filler.fill(clause.questions[asked].answer);
  const std::string other = filler.fill(clause.questions[1 - asked].answer);
  const nlohmann::json reference{{"answer", answer}, {"evidence", text}, {"distractor", other}};
  return {text + " " + clause.questions[asked].text, answer, reference.dump(),
          concat("clause/", number, "/", asked)};
}

// Puts another digit into the first number of a text; nothing when it has none.
std::string with_wrong_number(std::string text) {
  const std::size_t digit = text.find_first_of("0123456789");
  if (digit == std::string::npos) return "";
  text[digit] = text[digit] == '9' ? '1' : static_cast<char>(text[digit] + 1);
  return text;
}

std::vector<Corruption> corrupt_clause(const Case& item, RandomStream&) {
  const auto reference = nlohmann::json::parse(item.reference);
  std::vector<Corruption> out = {{reference["distractor"].get<std::string>(), "wrong_span"},
                                 {reference["evidence"].get<std::string>(), "whole_clause"},
                                 {"It depends.", "no_span"}};
  const std::string wrong = with_wrong_number(item.answer);
  if (!wrong.empty()) out.push_back({wrong, "wrong_number"});
  return out;
}

}  // namespace

KindSource clause_source() {
  return {"Quote the answer.", clause_template_ids, draw_clause, corrupt_clause};
}

}  // namespace rlhf::finance

#include <nlohmann/json.hpp>

#include "rlhf/core/error.h"
#include "rlhf/data/finance_desk/generator.h"

namespace rlhf::finance {
namespace {

struct IntentTemplates {
  std::string label;
  std::vector<std::string> train;
  std::vector<std::string> held_out;
};

const std::vector<IntentTemplates>& intent_templates() {
  static const std::vector<IntentTemplates> templates = {
      {"lost card",
       {"I left my card in {city} and cannot find it.", "My wallet was stolen {day}, please block the card.",
        "My debit card vanished {day}.", "Someone took my bank card in {city}.",
        "I think I dropped my card at {shop}.", "Please freeze my card, it is gone since {day}.",
        "I can't find my credit card since {day}.", "Block my card, I was robbed in {city}.",
        "The card fell out of my bag at {shop}.", "Somebody stole my purse with the card {day}."},
       {"My card is missing after a trip to {city}.", "A thief has my card since {day}, stop it now."}},
      {"card arrival",
       {"When will my new card come to {city}?", "I ordered a card {day} and it is not here yet.",
        "How long does a card take by post to {city}?", "Still waiting for the card you sent {day}.",
        "Has my replacement card been mailed?", "Can I track the delivery of my card to {city}?",
        "Where is the card you promised for {day}?", "My letter with the card never reached {city}.",
        "How many days until my debit card is delivered?",
        "The post brought nothing, is my card on its way?"},
       {"The card I requested {day} has not arrived.", "What date will my card be delivered in {city}?"}},
      {"refund",
       {"{shop} owes me {amount} back, where is it?", "I returned the goods {day} and want my money back.",
        "How do I get {amount} refunded by {shop}?", "The refund from {shop} is not on my statement.",
        "I cancelled an order for {amount}, when is it paid back?",
        "I want a refund for what I bought {day}.", "Can I get my {amount} back from {shop}?",
        "{shop} promised to pay me back {day}, nothing came.",
        "I was billed twice by {shop} and want {amount} returned.", "Is my refund of {amount} on its way?"},
       {"When do I see the refund of {amount} from {shop}?",
        "I sent it back to {shop} and got no money back."}},
      {"fee",
       {"Why was I charged {amount} for my account?", "What does a cash withdrawal in {city} cost me?",
        "Do you charge for keeping the account open?", "There is a fee of {amount} I do not know.",
        "How much is the monthly charge?", "Is there a charge for paying {person}?",
        "You took {amount} off my account, what for?", "What do you charge for a card abroad?",
        "Is a transfer to {city} free of charge?", "Please list the costs of my account."},
       {"What is this {amount} charge on my account for?", "How high are the fees when I pay in {city}?"}},
      {"exchange rate",
       {"What rate do I get for {currency}?", "How many {currency} do I get for {amount}?",
        "Which rate was used when I paid in {city}?", "Is the rate for {currency} better today?",
        "I want to change {amount} into {currency}.", "Where do I see your rate for {currency}?",
        "How much is {amount} in {currency}?", "Will you give me a fair rate for {currency}?",
        "What was the price of {currency} {day}?", "Convert {amount} to {currency} at which rate?"},
       {"At what rate do you convert {currency}?", "The rate for {currency} on my payment looks wrong."}},
      {"failed transfer",
       {"My transfer to {person} did not go through.", "The payment of {amount} was rejected {day}.",
        "Sending {amount} to {person} gives an error.", "Why did my transfer {day} bounce?",
        "{person} never got my {amount}.", "My bank transfer is declined every time.",
        "The {amount} I wired {day} were sent back.", "Why can't I send money to {person}?",
        "My payment to {shop} was refused.", "The app says transfer failed when I pay {person}."},
       {"The transfer of {amount} to {person} failed.",
        "I sent money {day} but it came back with an error."}},
      {"top up",
       {"How do I add {amount} to my account?", "Can I load cash on my account at {shop}?",
        "I want to top up with another card.", "My top up of {amount} is not showing.",
        "Put {amount} on my prepaid card please.", "Can I pay in cash in {city}?",
        "How can I load my card with {amount}?", "Adding money from another bank does not work.",
        "I want to put cash on my card at {shop}.", "Where can I recharge my prepaid card in {city}?"},
       {"I need to load {amount} on my card.", "Does topping up {amount} take long?"}},
      {"loan terms",
       {"What interest do you ask on a loan of {sum}?", "How long can I take to repay {sum}?",
        "Can I borrow {sum} for {goal}?", "Can I pay off my loan early?",
        "What is the monthly rate on a {sum} credit?", "Which papers do I need for a loan of {sum}?",
        "How much interest is due if I borrow {sum}?", "Do I qualify for a credit of {sum}?",
        "I need {sum} for {goal}, what would I pay monthly?", "What happens if I repay my loan late?"},
       {"I want to borrow {sum} over {months} months, at what rate?",
        "What are the conditions of a loan for {goal}?"}},
      {"fund choice",
       {"Which fund suits me if I save for {goal}?", "Should I buy {fund} or {fund2}?",
        "Recommend a fund for {sum}, please.", "I look for a low cost fund for {goal}.",
        "What fund is right for a beginner with {sum}?", "Is {fund} a good pick for {goal}?",
        "I have {sum} to invest, which fund should I take?", "Name a fund that fits {goal}.",
        "Would you take {fund} or {fund2} for {goal}?", "Which of your funds is the safest for {sum}?"},
       {"Help me choose a fund for {goal}.", "Which is better for me, {fund} or {fund2}?"}},
      {"fund diagnosis",
       {"Why has {fund} lost {percent}% this year?", "How has {fund} done against its index?",
        "What went wrong in {fund} {day}?", "Is the risk of {fund} too high now?",
        "Analyse the results of {fund} for me.", "{fund} fell {percent}%, what happened?",
        "Is something wrong with {fund}?", "How did {fund} perform {day}?",
        "Why does {fund} lag behind {fund2}?", "Tell me why {fund} dropped {percent}%."},
       {"Explain the drop of {percent}% in {fund}.", "How healthy is {fund} at the moment?"}},
      {"asset allocation",
       {"How should I split {sum} between bonds and shares?", "Is {percent}% in shares too much at {age}?",
        "Please rebalance my portfolio for {goal}.", "What mix of assets do I need at {age}?",
        "How much gold should my portfolio hold?", "I have {percent}% in cash, how should I spread it?",
        "How many bonds should I hold at {age}?", "Where should I put {sum}: shares, bonds or gold?",
        "Is my portfolio with {percent}% shares balanced?", "Which weights of stocks and cash suit {goal}?"},
       {"What share of stocks and bonds fits {age} years?", "How do I divide {sum} over asset classes?"}},
      {"coverage",
       {"Does my policy pay for {peril}?", "Is {thing} insured against {peril}?",
        "Am I covered when I travel to {city}?", "Does the policy include {thing}?",
        "Is damage by {peril} part of my plan?", "Am I insured if {person} drives my car?",
        "Will you pay if {thing} is hit by {peril}?", "Does my insurance cover {peril} in {city}?",
        "What does my policy say about {thing}?", "Is {thing} included in my home insurance?"},
       {"Would my insurance pay if {peril} hit {thing}?", "Is {peril} covered by my policy?"}},
      {"claim",
       {"I want to report damage to {thing}.", "How do I file a claim for {peril}?",
        "{thing} was damaged {day}, what do I send you?", "What is the status of my claim for {amount}?",
        "{peril} ruined {thing}, where is the claim form?", "When will you pay my claim for {thing}?",
        "{peril} damaged {thing}, how do I get paid?", "I sent my claim {day}, what happens now?",
        "Which form do I fill in after {peril}?", "Please open a claim for {thing}."},
       {"I need to submit a claim, {peril} hit {thing}.",
        "Where do I send photos for my claim of {amount}?"}},
      {"underwriting",
       {"Can I get life cover with {illness}?", "Will {illness} raise my premium?",
        "Do I need a medical check at {age}?", "I smoke, can I still be insured?",
        "Would you accept me at {age} with {illness}?", "Must I tell you about {illness} when I apply?",
        "Does {illness} exclude me from cover?", "I have {illness}, what will my policy cost?",
        "At {age}, can I still buy life insurance?", "Do you ask about {illness} before I sign?"},
       {"Do you insure people with {illness}?", "I am {age} and have {illness}, will I be accepted?"}},
      {"other",
       {"What is the weather in {city}?", "Tell me a joke about {person}.", "Who won the match {day}?",
        "How do I cook rice for {person}?", "Write a poem about {city}.", "Which film should I watch {day}?",
        "How far is it from here to {city}?", "Sing me a song about {thing}.",
        "What should I give {person} for a birthday?", "Which language is spoken in {city}?"},
       {"What is the best museum in {city}?", "How do I repair {thing} myself?"}},
  };
  return templates;
}

std::vector<std::string> intent_template_ids(Split split) {
  std::vector<std::string> ids;
  for (const IntentTemplates& entry : intent_templates()) {
    const bool held_out = split == Split::kHeldOut;
    const std::size_t count = held_out ? entry.held_out.size() : entry.train.size();
    for (std::size_t i = 0; i < count; ++i) {
      ids.push_back(concat("intent/", entry.label, "/", held_out ? entry.train.size() + i : i));
    }
  }
  return ids;
}

Draft draw_intent(Split split, RandomStream& random) {
  const IntentTemplates& entry = pick(intent_templates(), random);
  const bool held_out = split == Split::kHeldOut;
  const auto& templates = held_out ? entry.held_out : entry.train;
  const std::size_t number = random.below(templates.size());
  SlotFiller filler(random, split);
  std::string message = filler.fill(templates[number]);
  message[0] = static_cast<char>(std::toupper(static_cast<unsigned char>(message[0])));
  return {with_opening(message, split, random), entry.label, nlohmann::json{{"label", entry.label}}.dump(),
          concat("intent/", entry.label, "/", held_out ? entry.train.size() + number : number)};
}

std::vector<Corruption> corrupt_intent(const Case& item, RandomStream& random) {
  const std::string& other = pick_other(intent_labels(), item.answer, random);
  return {{other, "other_label"},
          {"The intent is " + item.answer, "malformed"},
          {item.answer + ", " + other, "two_labels"}};
}

}  // namespace

const std::vector<std::string>& intent_labels() {
  static const std::vector<std::string> labels = [] {
    std::vector<std::string> out;
    for (const IntentTemplates& entry : intent_templates()) out.push_back(entry.label);
    return out;
  }();
  return labels;
}

KindSource intent_source() {
  return {"Name the intent.", intent_template_ids, draw_intent, corrupt_intent};
}

}  // namespace rlhf::finance

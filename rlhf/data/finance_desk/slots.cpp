#include <charconv>

#include "rlhf/core/error.h"
#include "rlhf/data/finance_desk/generator.h"

namespace rlhf::finance {
namespace {

using Values = std::vector<std::string>;

// Every fourth value is held out. Numeric slots are drawn, see draw().
const std::map<std::string, Values>& text_slots() {
  static const std::map<std::string, Values> slots = {
      {"city",
       {"Lisbon", "Oslo", "Chicago", "Nairobi", "Vienna", "Madrid", "Toronto", "Osaka", "Dublin", "Prague",
        "Sydney", "Lima", "Athens", "Warsaw", "Boston", "Seoul"}},
      {"day",
       {"Monday", "Tuesday", "Friday", "Sunday", "yesterday", "last week", "this morning", "two days ago",
        "on payday", "last night", "at noon", "over the weekend"}},
      {"shop",
       {"the bakery", "a bookshop", "an airline", "the gym", "a hotel", "the pharmacy", "a shoe store",
        "the cinema", "a taxi firm", "the florist", "a phone shop", "the garage"}},
      {"person",
       {"my sister", "my landlord", "a friend", "my nephew", "our cleaner", "my father", "a supplier",
        "my tutor", "my cousin", "a colleague", "my dentist", "our gardener"}},
      {"currency",
       {"euros", "yen", "dollars", "francs", "pounds", "kronor", "rupees", "pesos", "dirhams", "zloty", "won",
        "rand"}},
      {"fund",
       {"the Alder fund", "the Birch fund", "the Cedar fund", "the Maple fund", "the Harbour fund",
        "the Summit fund", "the Delta fund", "the Orchid fund", "the Beacon fund", "the Granite fund",
        "the Willow fund", "the Falcon fund"}},
      {"thing",
       {"my laptop", "the roof", "my bicycle", "the car", "a ring", "the kitchen", "my camera", "the boat",
        "my phone", "the garage door", "a violin", "the fence"}},
      {"peril",
       {"a flood", "a fire", "hail", "a burst pipe", "a storm", "theft", "lightning", "vandalism",
        "a fallen tree", "frost", "a break-in", "smoke"}},
      {"illness",
       {"asthma", "diabetes", "a back injury", "high blood pressure", "migraine", "arthritis", "epilepsy",
        "a heart murmur", "gout", "anaemia", "eczema", "sleep apnoea"}},
      {"goal",
       {"a house", "retirement", "college", "a wedding", "a boat", "a sabbatical", "a new car", "a studio",
        "a cottage", "a world trip", "a bakery", "a farm"}},
      {"company", {"Norvale", "Tessera", "Quillon",        "Brightmoor", "Castellan", "Ferrow",
                   "Halden",  "Ostara",  "Pellworm",       "Rivergate",  "Solbank",   "Zephra",
                   "Marlock", "Trivane", "Calderon Mills", "Ulmer",      "Vantor",    "Ashdown",
                   "Lumera",  "Corvex",  "Bellhaven",      "Nortide",    "Oakline",   "Straton"}},
      {"product",
       {"pumps", "chips", "tyres", "vaccines", "batteries", "cement", "shoes", "toys", "drones", "coffee",
        "turbines", "paints"}},
      {"country",
       {"Chile", "Kenya", "Norway", "Japan", "Brazil", "Canada", "Poland", "Vietnam", "Egypt", "Spain",
        "Turkey", "Peru"}},
  };
  return slots;
}

const Values& openings() {
  static const Values values = {"Hi. ",
                                "Hello, ",
                                "Please help. ",
                                "Hey there. ",
                                "Good day. ",
                                "Hi team, ",
                                "One thing: ",
                                "Quick question: ",
                                "Urgent: ",
                                "Dear desk, ",
                                "Sorry to ask. ",
                                "Good morning. ",
                                "A question. ",
                                "Hello again. ",
                                "Excuse me, ",
                                "Just checking: ",
                                "Thanks in advance. ",
                                "Hi all. ",
                                "Short one: ",
                                "Evening. "};
  return values;
}

const Values& headings() {
  static const Values values = {
      "", "Note: ", "Morning brief. ", "Desk note: ", "Update. ", "Analyst says: ", "Flash: ", "Research: "};
  return values;
}

std::string draw_text(const Values& values, Split split, RandomStream& random) {
  const std::size_t group = random.below(values.size() / 4);
  return values[4 * group + (split == Split::kHeldOut ? 3 : random.below(3))];
}

const std::map<std::string, NumberRange>& number_slots() {
  static const std::map<std::string, NumberRange> slots = {
      {"amount", {2, 180, 25}}, {"sum", {10, 900, 100}},  {"days", {5, 90, 1}}, {"months", {2, 36, 1}},
      {"percent", {2, 60, 1}},  {"limit", {2, 95, 1000}}, {"age", {18, 80, 1}},
  };
  return slots;
}

std::string family_of(const std::string& slot) {
  return slot.substr(0, slot.find_last_not_of("0123456789") + 1);
}

}  // namespace

bool is_held_out(std::uint64_t number) {
  // A multiplicative hash, so that held-out numbers have no digit pattern of their own.
  return ((number * 2654435761U) >> 16) % 4 == 3;
}

std::uint64_t draw_number(RandomStream& random, Split split, const NumberRange& range) {
  std::uint64_t number = 0;
  do {
    number = range.step * (range.min_k + random.below(range.max_k - range.min_k + 1));
  } while (is_held_out(number) != (split == Split::kHeldOut));
  return number;
}

std::string SlotFiller::draw(const std::string& family) {
  if (const auto text = text_slots().find(family); text != text_slots().end()) {
    return draw_text(text->second, split_, random_);
  }
  const auto number = number_slots().find(family);
  if (number == number_slots().end()) fail<InternalError>("finance desk: no slot {", family, "}");
  return std::to_string(draw_number(random_, split_, number->second));
}

const std::string& SlotFiller::value(const std::string& slot) {
  if (const auto found = values_.find(slot); found != values_.end()) return found->second;
  const std::string family = family_of(slot);
  const auto taken = [&](const std::string& candidate) {
    for (const auto& [other, used] : values_) {
      if (family_of(other) == family && used == candidate) return true;
    }
    return false;
  };
  std::string candidate = draw(family);
  while (taken(candidate)) candidate = draw(family);
  return values_[slot] = candidate;
}

std::string SlotFiller::fill(std::string_view text) {
  std::string out;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '{') {
      out += text[i];
      continue;
    }
    const std::size_t end = text.find('}', i);
    if (end == std::string_view::npos) fail<InternalError>("finance desk: open slot in ", text);
    out += value(std::string(text.substr(i + 1, end - i - 1)));
    i = end;
  }
  return out;
}

const std::string& pick_other(const std::vector<std::string>& choices, const std::string& not_this,
                              RandomStream& random) {
  while (true) {
    const std::string& choice = pick(choices, random);
    if (choice != not_this) return choice;
  }
}

std::string with_opening(const std::string& message, Split split, RandomStream& random) {
  constexpr double kShareWithout = 0.4;
  if (random.uniform() < kShareWithout) return message;
  return draw_text(openings(), split, random) + message;
}

std::string with_heading(const std::string& note, Split split, RandomStream& random) {
  constexpr double kShareWithout = 0.4;
  if (random.uniform() < kShareWithout) return note;
  return draw_text(headings(), split, random) + note;
}

}  // namespace rlhf::finance

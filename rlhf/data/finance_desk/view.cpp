#include <nlohmann/json.hpp>

#include "rlhf/core/error.h"
#include "rlhf/data/finance_desk/generator.h"

namespace rlhf::finance {
namespace {

struct ViewTemplates {
  std::string label;
  std::vector<std::string> train;
  std::vector<std::string> held_out;
};

const std::vector<ViewTemplates>& view_templates() {
  static const std::vector<ViewTemplates> templates = {
      {"bullish",
       {"{company} raised its outlook as orders for {product} jumped {percent}%.",
        "Sales of {product} at {company} beat every forecast.",
        "We expect {company} to gain from demand in {country}.",
        "{company} won a {sum} million contract in {country}.",
        "Margins at {company} widened for the third quarter.",
        "{company} doubled its dividend after a record year.",
        "The new {product} of {company} sell out in {country}.",
        "Debt at {company} fell {percent}% and cash is strong.",
        "{company} takes market share from weak rivals.",
        "Costs at {company} drop fast, profit should rise {percent}%.",
        "Upgrade {company}: the price does not reflect its growth.",
        "A patent gives {company} the lead in {product}.",
        "Although {product} were slow, {company} raised its profit target by {percent}%.",
        "{company} posts its best quarter ever.",
        "Buyers queue for the {product} of {company}.",
        "New factory in {country} lets {company} grow.",
        "{company} raises prices and keeps its clients.",
        "Orders at {company} are up {percent}% on last year.",
        "We add {company} to our list of favourites.",
        "{company} pays off its loans ahead of time.",
        "A rival leaves {country}, which helps {company}.",
        "The order book of {company} is full for two years."},
       {"{company} lifted its guidance thanks to {product}.",
        "Profit at {company} climbed {percent}%, more than hoped.",
        "Strong demand for {product} in {country} helps {company}.",
        "Despite a weak start in {country}, {company} now beats its plan.",
        "{company} sells more {product} than it can make.",
        "Analysts raise their target for {company} by {percent}%.",
        "The bet of {company} on {country} pays off."}},
      {"bearish",
       {"{company} cut its outlook as orders for {product} fell {percent}%.",
        "Sales of {product} at {company} missed every forecast.",
        "We fear {company} will lose its licence in {country}.",
        "{company} lost a {sum} million contract in {country}.",
        "Margins at {company} shrank for the third quarter.",
        "{company} scrapped its dividend after a heavy loss.",
        "A recall of {product} hurts {company} in {country}.",
        "Debt at {company} rose {percent}% and cash runs out.",
        "{company} loses market share to cheaper rivals.",
        "Costs at {company} soar, profit may halve.",
        "Downgrade {company}: the price ignores its weak orders.",
        "A lawsuit over {product} threatens {company}.",
        "Although {product} sold well, {company} lowered its profit target by {percent}%.",
        "{company} reports its worst quarter ever.",
        "Clients return the {product} of {company}.",
        "A strike in {country} stops {company}.",
        "{company} must lower prices to keep its clients.",
        "Orders at {company} are down {percent}% on last year.",
        "We take {company} off our list of favourites.",
        "{company} cannot pay its loans on time.",
        "A new rival in {country} worries {company}.",
        "The order book of {company} is empty."},
       {"{company} warned on profit because of {product}.",
        "Profit at {company} sank {percent}%, worse than feared.",
        "Falling demand for {product} in {country} hits {company}.",
        "Despite a good start in {country}, {company} now misses its plan.",
        "{company} sits on {product} that nobody buys.",
        "Analysts cut their target for {company} by {percent}%.",
        "The bet of {company} on {country} went wrong."}},
      {"neutral",
       {"{company} confirmed its outlook for {product}.",
        "Sales of {product} at {company} were in line with forecasts.",
        "{company} moves its head office to {country}.",
        "Growth in {country} at {company} offsets weaker {product}.",
        "Margins at {company} were unchanged this quarter.",
        "{company} keeps its dividend as it was.",
        "{company} publishes its report on {product} next month.",
        "We see no reason to change our view of {company}.",
        "{company} named a new head of {product}.",
        "Gains in {product} and losses in {country} cancel out at {company}.",
        "The shares of {company} are fairly priced.",
        "{company} holds its annual meeting in {country}.",
        "Costs at {company} rose {percent}%, and so did sales.",
        "{company} meets expectations once more.",
        "{company} changes its logo.",
        "Sales of {product} rose while those in {country} fell.",
        "{company} moves its listing to {country}.",
        "The board of {company} meets next week.",
        "Orders at {company} were flat on last year.",
        "We keep our rating of {company}.",
        "{company} repeats its forecast for {product}.",
        "The price of {company} already reflects the news."},
       {"{company} left its guidance for {product} unchanged.", "Profit at {company} came in as expected.",
        "{company} renamed its unit in {country}.",
        "Higher sales of {product} balance higher costs at {company}.",
        "{company} sold as many {product} as last year.", "Analysts leave their target for {company} alone.",
        "{company} opens an office in {country} and closes another."}},
  };
  return templates;
}

std::vector<std::string> view_template_ids(Split split) {
  std::vector<std::string> ids;
  for (const ViewTemplates& entry : view_templates()) {
    const bool held_out = split == Split::kHeldOut;
    const std::size_t count = held_out ? entry.held_out.size() : entry.train.size();
    for (std::size_t i = 0; i < count; ++i) {
      ids.push_back(concat("view/", entry.label, "/", held_out ? entry.train.size() + i : i));
    }
  }
  return ids;
}

Draft draw_view(Split split, RandomStream& random) {
  const ViewTemplates& entry = pick(view_templates(), random);
  const bool held_out = split == Split::kHeldOut;
  const auto& templates = held_out ? entry.held_out : entry.train;
  const std::size_t number = random.below(templates.size());
  SlotFiller filler(random, split);
  return {with_heading(filler.fill(templates[number]), split, random), entry.label,
          nlohmann::json{{"label", entry.label}}.dump(),
          concat("view/", entry.label, "/", held_out ? entry.train.size() + number : number)};
}

std::vector<Corruption> corrupt_view(const Case& item, RandomStream& random) {
  return {{pick_other(view_labels(), item.answer, random), "other_label"},
          {"The view is " + item.answer, "malformed"}};
}

}  // namespace

const std::vector<std::string>& view_labels() {
  static const std::vector<std::string> labels = [] {
    std::vector<std::string> out;
    for (const ViewTemplates& entry : view_templates()) out.push_back(entry.label);
    return out;
  }();
  return labels;
}

KindSource view_source() {
  return {"Bullish, bearish or neutral?", view_template_ids, draw_view, corrupt_view};
}

}  // namespace rlhf::finance

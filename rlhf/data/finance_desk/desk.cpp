#include "rlhf/data/finance_desk/desk.h"

#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "rlhf/core/atomic_file.h"
#include "rlhf/core/error.h"
#include "rlhf/data/finance_desk/generator.h"

namespace rlhf::finance {
namespace {

using nlohmann::ordered_json;

// Streams of one seed: kinds and splits never share draws.
std::uint64_t stream_of(Kind kind, Split split) {
  return 0x6465736b00U + 2 * static_cast<std::uint64_t>(kind) + (split == Split::kHeldOut);
}

PromptId case_id(Kind kind, Split split, std::size_t number) {
  return (static_cast<PromptId>(kind) + 1) << 40 | static_cast<PromptId>(split == Split::kHeldOut) << 39 |
         number;
}

ordered_json header(const Case& item) {
  return {{"id", item.id}, {"task", to_string(item.kind)}, {"template", item.template_id}};
}

template <class Append>
void write_lines(const std::filesystem::path& path, const std::vector<Case>& cases, Append append) {
  std::string text;
  for (const Case& item : cases) append(item, text);
  write_file_atomically(path, text);
}

}  // namespace

const char* to_string(Kind kind) {
  switch (kind) {
    case Kind::kIntent:
      return "intent";
    case Kind::kGate:
      return "gate";
    case Kind::kCalculation:
      return "calculation";
    case Kind::kClause:
      return "clause";
    case Kind::kView:
      return "view";
  }
  return "unknown";
}

Kind kind_from_string(std::string_view name) {
  for (const Kind kind : kAllKinds) {
    if (name == to_string(kind)) return kind;
  }
  fail<InvalidArgument>("finance desk: no task kind \"", name,
                        "\", expected intent, gate, calculation, clause or view");
}

const char* to_string(Split split) {
  return split == Split::kTrain ? "train" : "held_out";
}

const KindSource& source_of(Kind kind) {
  static const std::map<Kind, KindSource> sources = {{Kind::kIntent, intent_source()},
                                                     {Kind::kGate, gate_source()},
                                                     {Kind::kCalculation, calculation_source()},
                                                     {Kind::kClause, clause_source()},
                                                     {Kind::kView, view_source()}};
  return sources.at(kind);
}

Chat Case::prompt() const {
  return {{"system", instruction}, {"user", question}};
}

std::vector<Case> make_cases(Kind kind, Split split, std::size_t count, std::uint64_t seed,
                             Templates templates) {
  constexpr std::size_t kMaxFutileDraws = 3000;
  const KindSource& source = source_of(kind);
  const auto ids = template_ids(kind, split, templates);
  const std::set<std::string> allowed(ids.begin(), ids.end());
  RandomStream random(seed, stream_of(kind, split));
  std::vector<Case> cases;
  std::set<std::string> seen;
  for (std::size_t futile = 0; cases.size() < count;) {
    Draft draft = source.draw(split, random);
    if (!allowed.contains(draft.template_id) || !seen.insert(draft.question).second) {
      RLHF_CHECK(++futile < kMaxFutileDraws, "finance desk: asked for ", count, " different ",
                 to_string(kind), " cases, the ", to_string(split), " templates gave ", cases.size());
      continue;
    }
    futile = 0;
    Case item;
    item.id = case_id(kind, split, cases.size());
    item.kind = kind;
    item.split = split;
    item.instruction = source.instruction;
    item.question = std::move(draft.question);
    item.answer = std::move(draft.answer);
    item.reference = std::move(draft.reference);
    item.template_id = std::move(draft.template_id);
    cases.push_back(std::move(item));
  }
  return cases;
}

std::vector<std::string> template_ids(Kind kind, Split split, Templates templates) {
  std::vector<std::string> ids = source_of(kind).template_ids(split);
  if (templates == Templates::kAll) return ids;
  // Every other pair: templates of a class stand together, and so do the two questions of a clause.
  std::vector<std::string> half;
  for (std::size_t i = 0; i < ids.size(); ++i)
    if (i % 4 < 2) half.push_back(std::move(ids[i]));
  return half;
}

std::vector<Corruption> corruptions(const Case& item, std::uint64_t seed) {
  constexpr std::uint64_t kCorruptionStream = std::uint64_t{1} << 63;
  RandomStream random(seed, kCorruptionStream | item.id);
  return source_of(item.kind).corrupt(item, random);
}

std::vector<Baseline> trivial_baselines(const std::vector<Case>& train) {
  RLHF_CHECK(!train.empty(), "finance desk: baselines need training cases");
  std::map<std::string, std::size_t> counts;
  for (const Case& item : train) ++counts[item.answer];
  Baseline majority{"majority", ""}, longest{"longest", ""};
  std::size_t most = 0;
  for (const auto& [answer, count] : counts) {
    if (count > most) {
      most = count;
      majority.answer = answer;
    }
    if (answer.size() > longest.answer.size()) longest.answer = answer;
  }
  return {majority, longest};
}

void write_sft_jsonl(const std::filesystem::path& path, const std::vector<Case>& cases) {
  write_lines(path, cases, [](const Case& item, std::string& text) {
    Chat chat = item.prompt();
    chat.push_back({"assistant", item.answer});
    ordered_json line = header(item);
    line["messages"] = to_json(chat);
    text += line.dump() + "\n";
  });
}

void write_prompt_jsonl(const std::filesystem::path& path, const std::vector<Case>& cases) {
  write_lines(path, cases, [](const Case& item, std::string& text) {
    ordered_json line = header(item);
    line["messages"] = to_json(item.prompt());
    line["reference"] = ordered_json::parse(item.reference);
    text += line.dump() + "\n";
  });
}

void write_pair_jsonl(const std::filesystem::path& path, const std::vector<Case>& cases, std::uint64_t seed) {
  write_lines(path, cases, [seed](const Case& item, std::string& text) {
    for (const Corruption& corruption : corruptions(item, seed)) {
      ordered_json line = header(item);
      line["prompt"] = to_json(item.prompt());
      line["chosen"] = item.answer;
      line["rejected"] = corruption.text;
      line["corruption"] = corruption.type;
      text += line.dump() + "\n";
    }
  });
}

}  // namespace rlhf::finance

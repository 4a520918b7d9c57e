#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "rlhf/core/ids.h"
#include "rlhf/data/chat.h"

/// The finance desk: a generator of short cases with verifiable answers from a bank, wealth and insurance
/// desk. Every case is a function of (seed, kind, split, number). Training and held-out cases share no
/// template, and no value of those slots that carry the answer (amounts, rates, names, places), so that
/// copying from memory does not help.
namespace rlhf::finance {

enum class Kind {
  kIntent,       ///< a customer's message -> one of intent_labels()
  kGate,         ///< a request -> "OK", "OFFTOPIC" or "REFUSE: <reason>"
  kCalculation,  ///< a word problem -> `<calc>expression</calc>`, which the environment evaluates
  kClause,       ///< a policy clause and a question -> the words of the clause that answer it
  kView          ///< a research note -> "bullish", "bearish" or "neutral"
};
inline constexpr std::array<Kind, 5> kAllKinds = {Kind::kIntent, Kind::kGate, Kind::kCalculation,
                                                  Kind::kClause, Kind::kView};
/// Returns "intent", "gate", "calculation", "clause" or "view"; also the `task` of the kind's prompts.
const char* to_string(Kind kind);
/// Returns the kind of that name. @throws InvalidArgument.
Kind kind_from_string(std::string_view name);

enum class Split { kTrain, kHeldOut };
const char* to_string(Split split);

/// The answers that count as valid for the label kinds. Order is fixed.
const std::vector<std::string>& intent_labels();
const std::vector<std::string>& gate_reasons();
const std::vector<std::string>& view_labels();

/// One case. `reference` is what the kind's reward needs, as JSON:
/// intent, view `{"label"}`; gate `{"verdict", "reason"?}`; calculation `{"value", "expression",
/// "evidence"}`; clause `{"answer", "evidence"}`.
struct Case {
  PromptId id = 0;  ///< unique over kinds and splits of one seed
  Kind kind = Kind::kIntent;
  Split split = Split::kTrain;
  std::string instruction;  ///< the system message; the same for every case of a kind
  std::string question;     ///< the user message
  std::string answer;       ///< the gold response
  std::string reference;
  std::string template_id;  ///< e.g. "calculation/simple_interest/2"; never in both splits

  /// System and user message.
  Chat prompt() const;
};

/// Which templates of a split may be drawn. Answers have to be written and questions come by themselves, so
/// demonstrations usually know only some of the wordings that prompts have.
enum class Templates {
  kAll,
  kHalf,  ///< about half of every class; always the same half
};

/// Returns `count` different cases. @throws InvalidArgument when the templates of the split cannot make that
/// many.
std::vector<Case> make_cases(Kind kind, Split split, std::size_t count, std::uint64_t seed,
                             Templates templates = Templates::kAll);

/// Returns the ids of the templates of one kind and split.
std::vector<std::string> template_ids(Kind kind, Split split, Templates templates = Templates::kAll);

/// A wrong answer to a case, for reward-model pairs. The kind's rule reward of `text` is below that of the
/// gold answer.
struct Corruption {
  std::string text;
  std::string type;  ///< e.g. "other_label", "wrong_operand", "malformed"
};
/// Returns one corruption of every type that the kind knows (and that applies to this case).
std::vector<Corruption> corruptions(const Case& item, std::uint64_t seed);

/// A constant answer: what a policy that ignores its prompt could learn.
struct Baseline {
  std::string name;  ///< "majority" (the most frequent training answer) or "longest" (the longest)
  std::string answer;
};
/// Computes the trivial baselines from training cases of one kind; ties go to the answer that comes first in
/// the alphabet. @throws InvalidArgument when `train` is empty.
std::vector<Baseline> trivial_baselines(const std::vector<Case>& train);

/// Write cases in the formats of rlhf/data/records.h. @throws IoError.
void write_sft_jsonl(const std::filesystem::path& path, const std::vector<Case>& cases);
void write_prompt_jsonl(const std::filesystem::path& path, const std::vector<Case>& cases);
/// One pair for every corruption of every case.
void write_pair_jsonl(const std::filesystem::path& path, const std::vector<Case>& cases, std::uint64_t seed);

}  // namespace rlhf::finance

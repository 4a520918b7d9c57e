// What an embedding program brings: options of its own that are read as strictly as the library's, and a
// reward of its own beside a built-in one. Scores the gold answer and every corrupted answer of a few finance
// cases.
#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>

#include "reward/rules/finance_rules.h"
#include "reward/scoring/composition.h"
#include "rlhf/config/reader.h"
#include "rlhf/core/error.h"
#include "rlhf/data/finance_desk/desk.h"

namespace {

/// Options of this program: the same declaration serves reading, checking and help.
struct EmbedOptions {
  std::string kind = "calculation";
  std::size_t cases = 2;
  double brevity_weight = 0.1;

  template <class V>
  void visit_fields(V& v) {
    v.field("kind", kind, "Task kind of the finance desk");
    v.field("cases", cases, "Cases to score", rlhf::config::at_least(1));
    v.field("brevity_weight", brevity_weight, "Factor of the brevity reward", rlhf::config::at_least(0));
  }
};

/// A reward of our own: 1 for an empty response, falling to 0 at 100 bytes.
class Brevity : public rlhf::RewardTerm {
 public:
  std::string_view name() const override { return "brevity"; }
  double score(const rlhf::ScoredSample& scored) const override {
    return 1.0 - static_cast<double>(std::min<std::size_t>(scored.text.size(), 100)) / 100.0;
  }
};

void show(const rlhf::RewardComposition& rewards, const rlhf::Prompt& prompt, const char* label,
          const std::string& text) {
  const rlhf::Sample sample;
  const rlhf::Score score = rewards.score({prompt, sample, text});
  std::printf("  %6.3f  %-14s %s\n", score.total, label, text.c_str());
}

void run(const EmbedOptions& options) {
  rlhf::RewardComposition rewards;
  rewards.add(std::make_unique<rlhf::finance::FinanceReward>(), {});
  rewards.add(std::make_unique<Brevity>(), {options.brevity_weight});

  const auto kind = rlhf::finance::kind_from_string(options.kind);
  for (const auto& item : rlhf::finance::make_cases(kind, rlhf::finance::Split::kTrain, options.cases, 1)) {
    rlhf::Prompt prompt;
    prompt.id = item.id;
    prompt.task = options.kind;
    prompt.text = item.question;
    prompt.reference = item.reference;
    std::printf("%s\n", item.question.c_str());
    show(rewards, prompt, "gold", item.answer);
    for (const auto& wrong : rlhf::finance::corruptions(item, 1))
      show(rewards, prompt, wrong.type.c_str(), wrong.text);
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    // Every argument is a key=value override of an empty configuration.
    rlhf::config::LoadOptions load;
    load.overrides.assign(argv + 1, argv + argc);
    run(rlhf::config::parse<EmbedOptions>("", "embed", load));
    return 0;
  } catch (const rlhf::ConfigError& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}

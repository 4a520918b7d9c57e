// The KL of the report against a sum over the vocabulary, one log-prob at a time.
#include "rlhf/train/divergence.h"

#include <cmath>

#include "rlhf/model/packed_rows.h"
#include "rlhf/model/sequence_pass.h"
#include "tests/catch.h"
#include "tests/train/gradient_check.h"

using namespace rlhf;

namespace {

LanguageModel spread_model(std::uint64_t seed) {
  NewModelOptions options = tiny_model();
  options.initial_std = 0.3;
  return LanguageModel::create(options, {}, seed);
}

// log p(token | tokens before position) from a forward pass of its own.
double logprob(const LanguageModel& model, std::span<const TokenId> tokens, std::size_t position,
               TokenId token, Compute<float> compute) {
  SequencePass<float> pass(model.config(), compute);
  const PackedRows rows({tokens.first(position)});
  pass.forward(model.parameters().weights(), rows, SequencePass<float>::Keep::kNothing);
  const TokenTarget target{rows.last_row(0), token};
  float out = 0;
  pass.token_logprobs(model.parameters().weights(), {&target, 1}, 1.0, {&out, 1}, {});
  return static_cast<double>(out);
}

}  // namespace

TEST_CASE("KL of responses is the sum over chosen tokens of the KL between the models' distributions") {
  ThreadPool pool(1);
  const Compute<float> compute(pool, kernels::detect_cpu_isa());
  const LanguageModel policy = spread_model(1), reference = spread_model(2);
  // Two texts with a common head; a forced token in the first does not count.
  const std::vector<ScoredText> texts = {{{10, 20, 30, 40, 50}, {0, 0, 1, 0, 1}}, {{10, 20, 31}, {0, 0, 1}}};
  const auto kl = policy_kl(policy.config(), policy.parameters().weights(), reference.parameters().weights(),
                            texts, 64, compute);
  REQUIRE(kl.size() == 2);
  for (std::size_t i = 0; i < texts.size(); ++i) {
    double expected = 0;
    for (std::size_t t = 1; t < texts[i].tokens.size(); ++t)
      for (TokenId v = 0; texts[i].mask[t] && v < policy.config().vocab_size; ++v) {
        const double lp = logprob(policy, texts[i].tokens, t, v, compute),
                     lq = logprob(reference, texts[i].tokens, t, v, compute);
        expected += std::exp(lp) * (lp - lq);
      }
    CHECK(expected > 0.01);
    CHECK(std::abs(kl[i] - expected) < 1e-4 * expected);
  }
  for (const double none : policy_kl(policy.config(), policy.parameters().weights(),
                                     policy.parameters().weights(), texts, 64, compute))
    CHECK(std::abs(none) < 1e-6);
  CHECK_THROWS_WITH(policy_kl(policy.config(), policy.parameters().weights(), policy.parameters().weights(),
                              {{{1, 2}, {1}}}, 64, compute),
                    ContainsSubstring("1 mask entries for 2 tokens"));
}

TEST_CASE("the report has the KL of the PPO stage to the policy before it") {
  const TinyData data;
  const Attempt run = attempt(data.options("kl"), PipelineSettings::Start::kFresh);
  for (const TaskReport& task : run.report.tasks)
    for (const StageScore& stage : task.stages) {
      INFO(task.task << " " << stage.stage);
      CHECK(stage.kl.has_value() == (stage.stage == "ppo"));
      if (stage.kl) CHECK(*stage.kl > 0);
    }
  // The same after a restart that finds PPO done, and its judged responses kept or lost.
  for (const bool kept : {true, false}) {
    if (!kept) std::filesystem::remove(data.path("kl") / "samples" / "eval_ppo.jsonl");
    std::filesystem::remove(data.path("kl") / "summary.json");
    const Attempt again = attempt(data.options("kl"), PipelineSettings::Start::kResume);
    for (std::size_t t = 0; t < run.report.tasks.size(); ++t)
      CHECK(again.report.tasks[t].stages.back().kl == run.report.tasks[t].stages.back().kl);
  }
}

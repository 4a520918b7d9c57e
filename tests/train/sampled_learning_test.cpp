// Stages that learn from the policy's own judged responses: rejection sampling and online preference
// learning.
#include <algorithm>
#include <cmath>

#include "rlhf/core/error.h"
#include "rlhf/train/online_preference.h"
#include "rlhf/train/rejection_sampling.h"
#include "tests/catch.h"
#include "tests/train/gradient_check.h"
#include "tests/train/tiny_run.h"

using namespace rlhf;
using Start = PipelineSettings::Start;

namespace {

// 1 for every token `wanted` among a response's tokens.
class CountToken : public RewardTerm {
 public:
  explicit CountToken(TokenId wanted) : wanted_(wanted) {}
  std::string_view name() const override { return "count"; }
  double score(const ScoredSample& scored) const override {
    return static_cast<double>(std::ranges::count(scored.sample.tokens, wanted_));
  }

 private:
  TokenId wanted_;
};

TaskData three_prompts(std::unique_ptr<RewardTerm> reward) {
  TaskData data;
  for (std::size_t i = 0; i < 3; ++i) {
    Prompt prompt;
    prompt.id = 10 + i;
    prompt.tokens = random_tokens(4 + i, i);
    prompt.task = "t";
    data.train_prompts.push_back(std::move(prompt));
  }
  data.rules.add(std::move(reward), {});
  return data;
}

RolloutOptions short_responses() {
  RolloutOptions rollout;
  rollout.max_new_tokens = 4;
  rollout.max_sequences = 8;
  return rollout;
}

// The share of the policy's probability on `token` right after each prompt, averaged.
double first_token_probability(const LanguageModel& model, const TaskData& data, TokenId token) {
  const Parameters<double> parameters = to_double(model.parameters(), {});
  double sum = 0;
  for (const Prompt& prompt : data.train_prompts) {
    auto tokens = prompt.tokens;
    tokens.push_back(token);
    sum += std::exp(double_logprobs(parameters, tokens).back()) / 3;
  }
  return sum;
}

}  // namespace

TEST_CASE("sampled groups answer their prompts, are judged, and depend on seed and iteration alone") {
  Lane lane;
  LanguageModel model = LanguageModel::create(tiny_model(), {}, 4);
  const TaskData data = three_prompts(std::make_unique<CountToken>(7));
  const RolloutOptions rollout = short_responses();
  GroupSamplerOptions options;
  options.samples_per_prompt = 5;
  GroupSampler sampler("s", model, nullptr, data, rollout, options, lane.context);
  const auto groups = sampler.sample(0, 0), later = sampler.sample(1, 0), again = sampler.sample(0, 0);
  REQUIRE(groups.size() == 3);
  std::size_t different = 0;
  for (std::size_t g = 0; g < 3; ++g) {
    REQUIRE(groups[g].size() == 5);
    for (std::size_t k = 0; k < 5; ++k) {
      const GroupResponse& response = groups[g][k];
      CHECK(response.prompt == &data.train_prompts[g]);
      CHECK(response.sample.prompt_id == 10 + g);
      CHECK(response.score == std::ranges::count(response.sample.tokens, 7));
      CHECK(best_of(groups[g]).score >= response.score);
      CHECK(worst_of(groups[g]).score <= response.score);
      const TrainingExample example = to_example(response);
      CHECK(example.tokens == response.tokens);
      CHECK(count_loss_tokens(example) == response.sample.tokens.size());
      CHECK(response.tokens == again[g][k].tokens);
      different += response.tokens != later[g][k].tokens;
    }
  }
  CHECK(different > 10);
  const auto two = sampler.sample(0, 2);
  CHECK(two.size() == 2);
}

TEST_CASE("rejection sampling is SFT on the best response of every prompt") {
  const TaskData data = three_prompts(std::make_unique<CountToken>(7));
  const RolloutOptions rollout = short_responses();
  RejectionSamplingOptions options;
  options.sampler.samples_per_prompt = 6;
  options.sft.max_steps = 3;
  options.sft.examples_per_step = 2;
  options.sft.optimizer.learning_rate = 0.01;
  // Done by hand: sample, take the best, call run_sft.
  Lane by_hand, lane;
  LanguageModel expected = LanguageModel::create(tiny_model(), {}, 4);
  GroupSampler sampler("rejection_sampling", expected, nullptr, data, rollout, options.sampler,
                       by_hand.context);
  for (std::int64_t iteration = 0; iteration < 2; ++iteration) {
    std::vector<TrainingExample> best;
    for (const ResponseGroup& group : sampler.sample(iteration, 0)) {
      const GroupResponse* chosen = &group[0];
      for (const GroupResponse& response : group)
        if (response.score > chosen->score) chosen = &response;
      best.push_back(to_example(*chosen));
    }
    run_sft(expected, best, options.sft, "sft", by_hand.context);
  }
  options.iterations = 2;
  LanguageModel model = LanguageModel::create(tiny_model(), {}, 4);
  RejectionSampling(model, nullptr, data, rollout, options, lane.context).run();
  CHECK(std::ranges::equal(model.parameters().trainable(), expected.parameters().trainable()));
  CHECK(lane.watcher.steps.contains({"rejection_sampling.2", 3}));
  CHECK(metric(lane.watcher.steps.at({"rejection_sampling", 2}), "kept", 0) == 3);
}

TEST_CASE("rejection sampling keeps all responses that reach a score, and says when there are none") {
  const TaskData data = three_prompts(std::make_unique<CountToken>(7));
  const RolloutOptions rollout = short_responses();
  Lane lane;
  LanguageModel model = LanguageModel::create(tiny_model(), {}, 4);
  RejectionSamplingOptions options;
  options.sampler.samples_per_prompt = 6;
  options.sft.max_steps = 1;
  options.keep = KeptResponses::kAll;
  options.min_score = 0;
  RejectionSampling(model, nullptr, data, rollout, options, lane.context).run();
  CHECK(metric(lane.watcher.steps.at({"rejection_sampling", 1}), "kept", 0) == 18);
  options.min_score = 100;
  CHECK_THROWS_WITH(RejectionSampling(model, nullptr, data, rollout, options, lane.context).run(),
                    ContainsSubstring("rejection_sampling: iteration 1: no response reached "
                                      "rejection_sampling.min_score = 100; the best one has "));
}

TEST_CASE("rejection sampling and online DPO make what is rewarded more likely (seed 5)") {
  const TokenId wanted = 7;
  const TaskData data = three_prompts(std::make_unique<CountToken>(wanted));
  RolloutOptions rollout = short_responses();
  rollout.max_new_tokens = 1;
  rollout.max_sequences = 64;
  const LanguageModel untrained = LanguageModel::create(tiny_model(), {}, 4);
  const double before = first_token_probability(untrained, data, wanted);
  SECTION("rejection sampling") {
    Lane lane;
    LanguageModel model = LanguageModel::create(tiny_model(), {}, 4);
    RejectionSamplingOptions options;
    options.iterations = 3;
    options.sampler.samples_per_prompt = 400;
    options.keep = KeptResponses::kAll;
    options.min_score = 1;
    options.sft.max_steps = 10;
    options.sft.optimizer.learning_rate = 0.01;
    RejectionSampling(model, nullptr, data, rollout, options, lane.context).run();
    CHECK(first_token_probability(model, data, wanted) > 10 * before);
  }
  SECTION("online DPO") {
    Lane lane;
    LanguageModel model = LanguageModel::create(tiny_model(), {}, 4);
    const Parameters<float> reference = model.parameters().frozen_copy();
    OnlinePreferenceOptions options;
    options.iterations = 40;
    options.prompts_per_step = 3;
    options.sampler.samples_per_prompt = 200;
    options.optimizer.learning_rate = 0.01;
    OnlinePreference(model, &reference, nullptr, data, rollout, options, lane.context).run();
    CHECK(first_token_probability(model, data, wanted) > 10 * before);
  }
}

TEST_CASE("online DPO without a difference in scores changes nothing") {
  class Same : public RewardTerm {
   public:
    std::string_view name() const override { return "same"; }
    double score(const ScoredSample&) const override { return 2; }
  };
  const TaskData data = three_prompts(std::make_unique<Same>());
  const RolloutOptions rollout = short_responses();
  Lane lane;
  LanguageModel model = LanguageModel::create(tiny_model(), {}, 4);
  const Parameters<float> reference = model.parameters().frozen_copy();
  const std::vector<float> before(model.parameters().trainable().begin(),
                                  model.parameters().trainable().end());
  OnlinePreferenceOptions options;
  options.iterations = 1;
  options.optimizer.learning_rate = 0.1;
  OnlinePreference(model, &reference, nullptr, data, rollout, options, lane.context).run();
  CHECK(std::ranges::equal(before, model.parameters().trainable()));
  CHECK(metric(lane.watcher.steps.at({"online_preference", 1}), "pairs", -1) == 0);
  CHECK_THROWS_WITH(OnlinePreference(model, nullptr, nullptr, data, rollout, options, lane.context),
                    "online_preference: the loss compares with a reference but there is no reference model");
}

TEST_CASE("stages that sample say what they lack") {
  const TinyData data;
  for (const std::string stage : {"rejection_sampling", "online_preference"}) {
    const auto parse = [&](std::vector<std::string> overrides) {
      overrides.insert(overrides.begin(), "stages=[" + stage + "]");
      return data.options("run", overrides);
    };
    CHECK_NOTHROW(parse({}));
    CHECK_THROWS_WITH(parse({"data.prompts_file=''"}),
                      ContainsSubstring("data.prompts_file") &&
                          ContainsSubstring("the stage '" + stage + "' needs this file"));
    CHECK_THROWS_WITH(parse({"rewards=[]"}), ContainsSubstring(stage + " on files needs a rule reward"));
    CHECK_THROWS_WITH(parse({stage + ".reward_model_weight=1"}),
                      ContainsSubstring(stage + ".reward_model_weight: needs the stage 'reward'"));
    CHECK_THROWS_WITH(parse({"rollout.sampling.temperature=0"}),
                      ContainsSubstring(stage + " needs sampled responses"));
  }
  CHECK_THROWS_WITH(data.options("run", {"rejection_sampling.keep=all"}),
                    ContainsSubstring("rejection_sampling.min_score: keep: all needs it"));
}

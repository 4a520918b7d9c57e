// What the trainer hands to the algorithm's functions: values behind cut responses, the sampler's log-probs.
#include <cmath>
#include <nlohmann/json.hpp>

#include "rlhf/train/build_task.h"
#include "rlhf/train/ppo_trainer.h"
#include "tests/catch.h"
#include "tests/train/gradient_check.h"
#include "tests/train/tiny_run.h"

namespace rlhf {
namespace {

class FirstIteration : public RunObserver {
 public:
  void step(const std::string&, std::int64_t step, std::int64_t, const Metrics& metrics) override {
    if (step == 1) first = metrics;
  }
  void sample(const std::string&, const std::string& json) override {
    const auto line = nlohmann::json::parse(json);
    if (line.at("iteration") == 1)
      texts.push_back(line.at("prompt").get<std::string>() + line.at("response").get<std::string>());
  }
  Metrics first;
  std::vector<std::string> texts;  ///< prompt and response
};

// One iteration in which every response is cut: eight of the letters a to h.
FirstIteration run_cut(const RunOptions& options) {
  FirstIteration observer;
  LanguageModel policy = load_policy(options);
  const TaskData task = build_task(options, policy);
  ThreadPool pool(1);
  StageContext context{Compute<float>(pool, kernels::detect_cpu_isa())};
  context.observer = &observer;
  context.seed = options.run.seed;
  const auto letters = [](GenerationRequest& request, std::uint64_t) {
    for (TokenId token = 'a'; token <= 'h'; ++token) request.constraint.allowed_tokens.push_back(token);
  };
  const PpoSetting setting{task, options.rollout, options.ppo, context, options.schedule, letters};
  PpoTrainer(policy, {}, setting).run();
  return observer;
}

}  // namespace

TEST_CASE("a cut response goes on from the critic's value of its last state") {
  const TinyData data;
  const auto options = [&](const std::string& bootstrap) {
    return data.options(
        "run", {"stages=[ppo]", "rewards=[{type: regex, pattern: '[0-9]'}]", "ppo.iterations=1",
                "ppo.reward_model_weight=0", "ppo.critic_init=policy", "ppo.samples_to_log=100",
                "ppo.algorithm.kl.placement=none", "ppo.algorithm.advantage.whitening=none",
                "ppo.algorithm.advantage.gae={gamma: 1, lambda: 1, bootstrap_truncated: " + bootstrap + "}"});
  };
  const FirstIteration ends = run_cut(options("false")), goes_on = run_cut(options("true"));
  CHECK(metric(ends.first, "response/truncated_fraction", 0) == Approx(1));
  REQUIRE(ends.texts == goes_on.texts);
  REQUIRE(ends.texts.size() == 6);

  // With gamma = lambda = 1 and no reward, A_t = V_last - V_t instead of -V_t.
  const LanguageModel policy = load_policy(options("true"));
  ModelConfig config = policy.config();
  config.scalar_head = true;
  config.num_labels = 1;
  Parameters<float> critic(config, policy.parameters().trainable_options(), &policy.parameters());
  critic.initialise_score_head(options("true").run.seed);
  const Parameters<double> in_double = to_double(critic, {});
  double last_value = 0;
  for (const std::string& text : ends.texts)
    last_value +=
        double_score(in_double, {text.begin(), text.end()}) / static_cast<double>(ends.texts.size());
  CHECK(std::abs(last_value) > 0.01);
  CHECK(metric(goes_on.first, "advantage/mean", 0) - metric(ends.first, "advantage/mean", 0) ==
        Approx(last_value).epsilon(1e-4));
}

TEST_CASE("every run measures the sampler against the trainer before the weights move") {
  const TinyData data;
  const auto first = [&](const std::string& name, std::vector<std::string> more) {
    std::vector<std::string> overrides = {"stages=[ppo]", "ppo.iterations=1", "ppo.reward_model_weight=0",
                                          "ppo.critic_init=policy", "ppo.algorithm.mini_batches=1"};
    overrides.insert(overrides.end(), more.begin(), more.end());
    return attempt(data.options(name, overrides), PipelineSettings::Start::kFresh).steps.at({"ppo", 1});
  };
  const Metrics exact = first("exact", {});
  CHECK(std::abs(metric(exact, "rollout/mismatch_kl", 1)) < 1e-6);
  CHECK(std::abs(metric(exact, "rollout/mismatch_k3_kl", 1)) < 1e-9);

  // Of 259 tokens the sampler keeps 5: it differs by far. Recomputed log-probs say the same.
  const Metrics filtered = first("filtered", {"rollout.sampling.top_k=5"});
  CHECK(metric(filtered, "rollout/mismatch_kl", 0) > 1);
  CHECK(metric(filtered, "rollout/mismatch_kl", 0) ==
        Approx(metric(filtered, "rollout_corr/kl", 0)).epsilon(1e-5));
  CHECK(metric(filtered, "rollout/mismatch_k3_kl", 0) ==
        Approx(metric(filtered, "rollout_corr/k3_kl", 0)).epsilon(1e-5));
  // In bypass mode nothing is recomputed, and the mismatch is measured all the same.
  const Metrics bypass =
      first("bypass", {"rollout.sampling.top_k=5", "ppo.algorithm.correction.bypass=true"});
  CHECK(metric(bypass, "rollout_corr/kl", 1) == 0);
  CHECK(metric(bypass, "rollout/mismatch_kl", 0) ==
        Approx(metric(filtered, "rollout/mismatch_kl", 1)).epsilon(1e-5));
  CHECK(metric(bypass, "policy/ratio_mean", 1) < 0.5);  // pi / pi_sampler, where the others have 1
}

}  // namespace rlhf

// What the stages compute: losses and gradients against plain formulas and central differences in double,
// adapters against merged weights, shared trunks against separate copies.
#include <algorithm>
#include <cmath>

#include "rlhf/core/error.h"
#include "rlhf/train/build_task.h"
#include "tests/catch.h"
#include "tests/train/gradient_check.h"
#include "tests/train/tiny_run.h"

using namespace rlhf;

TEST_CASE("the gradient of the SFT loss equals central differences over masked tokens") {
  Lane lane;
  LanguageModel model = LanguageModel::create(tiny_model(), {}, 4);
  std::vector<TrainingExample> examples;
  for (std::size_t i = 0; i < 5; ++i) {
    TrainingExample example{random_tokens(5 + 4 * i, i), {}};
    for (std::size_t t = 0; t < example.tokens.size(); ++t) example.loss_mask.push_back(t > 2 && t % 3 != 1);
    examples.push_back(std::move(example));
  }
  Parameters<double> in_double = to_double(model.parameters(), {});
  const std::vector<float> before(model.parameters().trainable().begin(),
                                  model.parameters().trainable().end());
  SftOptions options;
  options.max_steps = 1;
  options.examples_per_step = 5;
  options.max_tokens_per_micro_batch = 30;  // several micro-batches: the mean is over the whole step
  options.optimizer = gradient_step();
  run_sft(model, examples, options, "sft", lane.context);
  const auto loss = [&] {
    double sum = 0, count = 0;
    for (const TrainingExample& example : examples) {
      const auto logprobs = double_logprobs(in_double, example.tokens);
      for (std::size_t t = 1; t < example.tokens.size(); ++t)
        if (example.loss_mask[t]) {
          sum -= logprobs[t - 1];
          ++count;
        }
    }
    return sum / count;
  };
  CHECK(metric(lane.watcher.steps.at({"sft", 1}), "loss", -1) == Approx(loss()).epsilon(1e-5));
  check_gradient(before, model.parameters(), in_double, loss);
}

TEST_CASE("the gradient of the Bradley-Terry loss equals central differences, with margin and centring") {
  Lane lane;
  ModelConfig config = LanguageModel::create(tiny_model(), {}, 4).config();
  config.scalar_head = true;
  config.num_labels = 1;
  Parameters<float> reward(config, {}, nullptr);
  reward.initialise(8, 0.3);
  reward.initialise_score_head(9);
  std::vector<TrainingPair> pairs;
  for (std::size_t i = 0; i < 4; ++i)
    pairs.push_back({{random_tokens(4 + 3 * i, 20 + i), {}},
                     {random_tokens(15 - 3 * i, 30 + i), {}},
                     0.25 * static_cast<double>(i),
                     "t"});
  Parameters<double> in_double = to_double(reward, {});
  const std::vector<float> before(reward.trainable().begin(), reward.trainable().end());
  RewardModelOptions options;
  options.max_steps = 1;
  options.pairs_per_step = 4;
  options.max_tokens_per_micro_batch = 40;
  options.loss.centring = 0.05;
  options.optimizer = gradient_step();
  run_reward_model(reward, pairs, options, lane.context);
  const auto loss = [&] {
    double sum = 0;
    for (const TrainingPair& pair : pairs) {
      const double chosen = double_score(in_double, pair.chosen.tokens),
                   rejected = double_score(in_double, pair.rejected.tokens);
      sum += -std::log(1 / (1 + std::exp(-(chosen - rejected - pair.margin)))) +
             0.05 * (chosen + rejected) * (chosen + rejected);
    }
    return sum / 4;
  };
  CHECK(metric(lane.watcher.steps.at({"reward", 1}), "loss", -1) == Approx(loss()).epsilon(1e-5));
  check_gradient(before, reward, in_double, loss);
}

TEST_CASE("SFT and reward model learn what they are shown") {
  const TinyData data;
  const auto options = data.options("run", {"sft.max_steps=60", "reward.max_steps=40", "pretrain.max_steps=2",
                                            "ppo.iterations=1", "sft.examples_per_step=5"});
  const Attempt run = attempt(options, PipelineSettings::Start::kFresh);
  const auto value = [&](const char* stage, std::int64_t step, const char* name) {
    return metric(run.steps.at({stage, step}), name, -1);
  };
  // 259 tokens at random: log 259 = 5.56 before, five short sentences learned by heart after.
  CHECK(value("pretrain", 1, "loss") > 4.5);
  CHECK(value("sft", 60, "loss") < 0.3 * value("sft", 1, "loss"));
  CHECK(value("reward", 1, "loss") == Approx(std::log(2.0)).margin(0.3));
  CHECK(value("reward", 40, "loss") < 0.1);
  CHECK(value("reward", 40, "accuracy") == 1);
  double accuracy = 0, pairs = 0;
  for (const auto& [name, number] : run.report.metrics) {
    if (name == "reward_model/accuracy") accuracy = number;
    if (name == "reward_model/pairs") pairs = number;
  }
  CHECK(accuracy == 1);
  CHECK(pairs == 5);
}

TEST_CASE("PPO raises a reward that can be raised (seed 3)") {
  const TinyData data;
  // Reward: 1 for responses of 2 to 4 tokens, less for longer ones; an untrained model seldom ends.
  const auto options =
      data.options("run", {"stages=[sft, ppo]", "sft.max_steps=1", "ppo.iterations=60",
                           "ppo.reward_model_weight=0", "ppo.critic_init=policy",
                           "ppo.algorithm.samples_per_prompt=8", "ppo.algorithm.optimizer.learning_rate=0.01",
                           "ppo.algorithm.kl.coefficient=0", "rollout.max_sequences=24"});
  const Attempt run = attempt(options, PipelineSettings::Start::kFresh);
  double early = 0, late = 0;
  for (std::int64_t i = 1; i <= 10; ++i) {
    early += metric(run.steps.at({"ppo", i}), "reward/total", 0) / 10;
    late += metric(run.steps.at({"ppo", 50 + i}), "reward/total", 0) / 10;
  }
  INFO("mean reward of the first ten batches " << early << ", of the last ten " << late);
  CHECK(late > early + 0.3);
}

TEST_CASE("the overlong penalty counts from the rollout's limit") {
  const TinyData data;
  // 8 tokens are the limit; an untrained model seldom ends before.
  const auto options = data.options(
      "run", {"stages=[sft, ppo]", "sft.max_steps=1", "ppo.iterations=1", "ppo.reward_model_weight=0",
              "ppo.critic_init=policy", "ppo.algorithm.reward.length.overlong_buffer=4"});
  const Attempt run = attempt(options, PipelineSettings::Start::kFresh);
  const auto& step = run.steps.at({"ppo", 1});
  const double penalty = metric(step, "objective/scores", 0) - metric(step, "objective/shaped_scores", 0);
  INFO("mean length " << metric(step, "rollout/mean_length", 0) << ", mean penalty " << penalty);
  CHECK(penalty > 0.3);
  CHECK(penalty <= 1);
}

TEST_CASE("ReMax: the score of the greedy response is the baseline") {
  const TinyData data;
  const auto largest_advantage = [&](const std::string& name, const std::string& temperature) {
    const auto options = data.options(
        name, {"stages=[sft, ppo]", "sft.max_steps=1", "ppo.iterations=1", "ppo.reward_model_weight=0",
               "ppo.critic_init=policy", "ppo.algorithm.critic_update=none",
               "ppo.algorithm.kl.placement=none", "ppo.algorithm.samples_per_prompt=100",
               "ppo.algorithm.reward.placement=last_token", "ppo.algorithm.value_positions=tokens",
               "ppo.algorithm.advantage={form: reward_to_go, greedy_baseline: true, whitening: none}",
               "rollout.sampling.temperature=" + temperature});
    const Attempt run = attempt(options, PipelineSettings::Start::kFresh);
    return metric(run.steps.at({"ppo", 1}), "advantage/abs_max", -1);
  };
  // Samples at a temperature near 0 are the greedy response: nothing is left of their scores. At 1 some of
  // 300 end early and score differently.
  CHECK(largest_advantage("cold", "0.0001") == 0);
  CHECK(largest_advantage("warm", "1") > 0);
}

TEST_CASE("combinations in which an option would do nothing are refused") {
  const TinyData data;
  const auto refused = [&](std::vector<std::string> overrides, const std::string& message) {
    INFO(message);
    CHECK_THROWS_WITH(data.options("run", std::move(overrides)), ContainsSubstring(message));
  };
  refused({"ppo.old_log_probs=rollout", "ppo.algorithm.correction.level=token"},
          "ppo.old_log_probs: rollout leaves algorithm.correction no difference to look at");
  refused({"ppo.algorithm.correction={bypass: true, level: token}"},
          "ppo.algorithm.correction.level: correction.bypass leaves nothing to weigh");
  refused({"ppo.algorithm.kl.estimator.gradient=k2"},
          "ppo.algorithm.kl.estimator.gradient: the KL in the reward has no gradient");
  refused({"ppo.algorithm.advantage.form=token_baseline", "ppo.algorithm.critic_update=none",
           "ppo.algorithm.samples_per_prompt=1"},
          "ppo.algorithm.samples_per_prompt: the token baselines compare responses of a prompt");
  refused({"ppo.algorithm.dynamic_sampling.enabled=true", "rewards=[]"},
          "ppo.algorithm.dynamic_sampling.enabled: looks at the spread of rule rewards");
  refused({"ppo.rules_weight=0", "ppo.reward_model_weight=0"}, "ppo.rules_weight: is 0, and so are");
  refused({"ppo.step_rewards=true"}, "ppo.step_rewards: needs reward.target: steps");
  refused({"ppo.algorithm.distillation.coefficient=1"},
          "distillation.teacher: ppo.algorithm.distillation.coefficient needs a teacher");
  refused({"distillation.teacher=somewhere"}, "distillation.teacher: is not used");
}

namespace {

TrainableOptions lora(std::vector<std::string> targets) {
  TrainableOptions options;
  options.mode = TrainableMode::kLora;
  options.lora_rank = 3;
  options.lora_alpha = 5;
  options.lora_targets = std::move(targets);
  return options;
}

void fill_randomly(std::span<float> values) {
  RandomStream random(77);
  for (float& value : values) value = static_cast<float>(0.2 * random.normal());
}

std::vector<float> logprobs_of(const Parameters<float>& parameters, const std::vector<TokenId>& tokens) {
  ThreadPool pool(1);
  SequencePass<float> pass(parameters.config(), Compute<float>(pool, kernels::detect_cpu_isa()));
  const PackedRows rows({tokens});
  pass.forward(parameters.weights(), rows, SequencePass<float>::Keep::kNothing);
  std::vector<TokenTarget> targets;
  for (std::size_t t = 1; t < tokens.size(); ++t)
    targets.push_back({static_cast<std::int64_t>(t) - 1, tokens[t]});
  std::vector<float> logprobs(targets.size());
  pass.token_logprobs(parameters.weights(), targets, 1, logprobs, {});
  return logprobs;
}

}  // namespace

TEST_CASE("an exported model with merged adapters computes what the adapters compute") {
  const TemporaryFolder folder;
  const auto tokens = random_tokens(40, 1);
  for (const auto& targets : std::vector<std::vector<std::string>>{
           {"q_proj", "v_proj"},
           {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
           {"up_proj"}}) {
    LanguageModel model = LanguageModel::create(tiny_model(), lora(targets), 4);
    const auto untrained = logprobs_of(model.parameters(), tokens);
    const LanguageModel base = LanguageModel::create(tiny_model(), {}, 4);
    // B starts at zero: fresh adapters change nothing.
    CHECK(untrained == logprobs_of(base.parameters(), tokens));
    fill_randomly(model.parameters().trainable());
    const auto adapted = logprobs_of(model.parameters(), tokens);
    model.save(folder.path() / "merged");
    const LanguageModel merged = LanguageModel::load(folder.path() / "merged", {});
    const auto exported = logprobs_of(merged.parameters(), tokens);
    double largest = 0, change = 0;
    for (std::size_t i = 0; i < adapted.size(); ++i) {
      largest = std::max(largest, std::abs(static_cast<double>(adapted[i] - exported[i])));
      change = std::max(change, std::abs(static_cast<double>(adapted[i] - untrained[i])));
    }
    CHECK(change > 0.01);
    CHECK(largest < 2e-5);  // W x + s B (A x) against (W + s B A) x: roundings of sums of 24 floats
    CHECK(merged.tokenizer().encode("abc") == model.tokenizer().encode("abc"));
    for (const auto& entry : merged.parameters().entries())
      CHECK(entry.spec.name.find("lora") == std::string::npos);
  }
}

TEST_CASE("LoRA gradients reach the adapters only, and equal central differences") {
  Lane lane;
  const auto trainable = lora({"q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"});
  LanguageModel model = LanguageModel::create(tiny_model(), trainable, 4);
  fill_randomly(model.parameters().trainable());
  const std::vector<TrainingExample> examples = {{random_tokens(20, 1), std::vector<std::uint8_t>(20, 1)}};
  Parameters<double> in_double = to_double(model.parameters(), trainable);
  const std::vector<float> before(model.parameters().trainable().begin(),
                                  model.parameters().trainable().end());
  std::map<std::string, std::vector<float>> frozen;
  for (const auto& entry : model.parameters().entries())
    if (!entry.gradient) frozen[entry.spec.name] = {entry.value, entry.value + entry.spec.num_elements()};
  CHECK(frozen.size() == 20);  // every tensor of the model itself
  SftOptions options;
  options.max_steps = 1;
  options.examples_per_step = 1;
  options.optimizer = gradient_step();
  run_sft(model, examples, options, "sft", lane.context);
  for (const auto& entry : model.parameters().entries())
    if (!entry.gradient)
      CHECK(std::equal(frozen[entry.spec.name].begin(), frozen[entry.spec.name].end(), entry.value));
  check_gradient(before, model.parameters(), in_double, [&] {
    const auto logprobs = double_logprobs(in_double, examples[0].tokens);
    double sum = 0;
    for (double logprob : logprobs) sum -= logprob;
    return sum / 19;
  });
}

TEST_CASE("a pass that starts from a shared trunk equals a pass of its own, bit for bit") {
  TrainableOptions last;
  last.mode = TrainableMode::kLastLayers;
  last.last_layers = 1;
  NewModelOptions three_layers = tiny_model();
  three_layers.layers = 3;
  ThreadPool pool(1);
  const auto tokens = random_tokens(30, 2), more = random_tokens(13, 3);
  const PackedRows rows({tokens, more});
  std::vector<TokenTarget> targets;
  for (std::int64_t t = 0; t < 29; ++t) targets.push_back({t, tokens[static_cast<std::size_t>(t) + 1]});
  std::vector<std::vector<float>> results;
  for (std::int64_t trunk : {-1, 0, 1, 2}) {
    LanguageModel model = LanguageModel::create(three_layers, last, 4);
    const auto& weights = model.parameters().weights();
    REQUIRE(weights.first_trainable_layer == 2);
    SequencePass<float> pass(model.config(), Compute<float>(pool, kernels::detect_cpu_isa()));
    if (trunk >= 0) pass.run_trunk(weights, rows, trunk);
    // Twice from one trunk, as actor and critic do.
    std::vector<float> logprobs(targets.size());
    const std::vector<float> slope(targets.size(), 0.5f);
    for (int i = 0; i < 2; ++i) {
      model.parameters().zero_gradient();
      pass.forward(weights, rows, SequencePass<float>::Keep::kForBackward);
      pass.token_logprobs(weights, targets, 1, logprobs, {});
      pass.token_logprobs_backward(weights, targets, 1, slope, {});
      pass.backward(weights, rows);
    }
    std::vector<float> result = logprobs;
    const auto gradient = model.parameters().gradient();
    result.insert(result.end(), gradient.begin(), gradient.end());
    results.push_back(std::move(result));
  }
  for (std::size_t i = 1; i < results.size(); ++i) CHECK(results[i] == results[0]);
}

TEST_CASE("a reward model that shares the frozen trunk learns what one with copies learns, bit for bit") {
  TrainableOptions last;
  last.mode = TrainableMode::kLastLayers;
  last.last_layers = 1;
  LanguageModel policy = LanguageModel::create(tiny_model(), last, 4);
  ModelConfig config = policy.config();
  config.scalar_head = true;
  config.num_labels = 1;
  std::vector<TrainingPair> pairs;
  for (std::size_t i = 0; i < 6; ++i)
    pairs.push_back({{random_tokens(9 + i, 40 + i), {}}, {random_tokens(12, 50 + i), {}}, 0, "t"});
  RewardModelOptions options;
  options.max_steps = 5;
  options.pairs_per_step = 4;
  options.optimizer.learning_rate = 0.01;

  Parameters<float> shared(config, last, &policy.parameters());
  CHECK(shared.shared_bytes() > 0);
  shared.initialise_score_head(9);
  Parameters<float> own(config, last, nullptr);
  CHECK(own.shared_bytes() == 0);
  for (const auto& entry : own.entries()) {
    const auto* source = shared.find(entry.spec.name);
    REQUIRE(source);
    std::copy_n(source->value, entry.spec.num_elements(), entry.value);
  }
  const std::vector<float> policy_before(policy.parameters().trainable().begin(),
                                         policy.parameters().trainable().end());
  Lane lane, other;
  run_reward_model(shared, pairs, options, lane.context);
  run_reward_model(own, pairs, options, other.context);
  CHECK(std::ranges::equal(shared.trainable(), own.trainable()));
  SequencePass<float> pass(config, lane.context.compute);
  CHECK(evaluate_pairs(pass, shared.weights(), {}, pairs).mean_margin ==
        evaluate_pairs(pass, own.weights(), {}, pairs).mean_margin);
  for (const auto& [step, metrics] : lane.watcher.steps)
    CHECK(metric(metrics, "loss", 0) == metric(other.watcher.steps.at(step), "loss", 1));
  // The policy that lends its trunk is not touched.
  CHECK(std::ranges::equal(policy.parameters().trainable(), policy_before));
}

TEST_CASE("the reference of a LoRA policy is the model without adapters") {
  LanguageModel model = LanguageModel::create(tiny_model(), lora({"q_proj", "v_proj"}), 4);
  const auto tokens = random_tokens(25, 5);
  const auto base = logprobs_of(model.parameters(), tokens);
  fill_randomly(model.parameters().trainable());
  CHECK(logprobs_of(model.parameters(), tokens) != base);
  const Parameters<float> reference = model.parameters().frozen_copy();
  CHECK(logprobs_of(reference, tokens) == base);
  CHECK(reference.trainable().empty());
  CHECK(reference.owned_bytes() == 0);
}

TEST_CASE("a frozen copy stays what it was while the policy learns") {
  for (const auto mode : {TrainableMode::kAll, TrainableMode::kLastLayers}) {
    TrainableOptions trainable;
    trainable.mode = mode;
    trainable.last_layers = 1;
    LanguageModel model = LanguageModel::create(tiny_model(), trainable, 4);
    const auto tokens = random_tokens(25, 6);
    const auto before = logprobs_of(model.parameters(), tokens);
    const Parameters<float> reference = model.parameters().frozen_copy();
    for (float& weight : model.parameters().trainable()) weight *= 1.5f;
    CHECK(logprobs_of(reference, tokens) == before);
    CHECK(logprobs_of(model.parameters(), tokens) != before);
  }
}

TEST_CASE("an exported model loads back as it was, bit for bit") {
  const TemporaryFolder folder;
  const LanguageModel model = LanguageModel::create(tiny_model(), {}, 4);
  model.save(folder.path() / "model");
  const LanguageModel loaded = LanguageModel::load(folder.path() / "model", {});
  const auto tokens = random_tokens(25, 7);
  CHECK(logprobs_of(loaded.parameters(), tokens) == logprobs_of(model.parameters(), tokens));
  CHECK(loaded.end_tokens() == model.end_tokens());
  const Chat chat = {{"user", "Hi \xc3\xa9"}};
  std::string a, b;
  CHECK(loaded.encode_chat(chat, &a) == model.encode_chat(chat, &b));
  CHECK(a == b);
  CHECK(a == "<|im_start|>user\nHi \xc3\xa9<|im_end|>\n<|im_start|>assistant\n");
}

// Passes and optimizer steps on an accelerator against float on the CPU.
#include <cmath>

#include "rlhf/kernels/float_hash.h"
#include "rlhf/model/sequence_pass.h"
#include "rlhf/train/language_model.h"
#include "rlhf/train/optimizer.h"
#include "tests/device/accelerators.h"

using namespace rlhf;

namespace {

constexpr double kTolerance = 0.04;  // relative: some dozen roundings to 8 bits on the way

LanguageModel make_trained_model(const TrainableOptions& trainable, std::int64_t layers = 2) {
  NewModelOptions options;
  options.layers = layers;
  options.hidden_size = 32;
  options.heads = 4;
  options.kv_heads = 2;
  options.intermediate_size = 48;
  options.max_positions = 96;
  options.initial_std = 0.2;
  return LanguageModel::create(options, trainable, 4);
}

double distance(std::span<const float> got, std::span<const float> expected) {
  REQUIRE(got.size() == expected.size());
  double difference = 0, size = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    difference += std::pow(static_cast<double>(got[i]) - static_cast<double>(expected[i]), 2);
    size += std::pow(static_cast<double>(expected[i]), 2);
  }
  return std::sqrt(difference / (size + 1e-30));
}

/// Two responses to one prompt and one to another, as PPO packs them.
struct Texts {
  std::vector<std::vector<TokenId>> tokens;
  PackedRows rows;
  std::vector<TokenTarget> targets;
  std::vector<float> dlogprobs, dentropies;

  Texts() : tokens(make()), rows({tokens.begin(), tokens.end()}) {
    RandomStream random(9);
    for (std::size_t s = 0; s < tokens.size(); ++s)
      for (std::size_t t = 20; t < tokens[s].size(); ++t) {
        targets.push_back({rows.row(s, static_cast<std::int64_t>(t) - 1), tokens[s][t]});
        dlogprobs.push_back(static_cast<float>(random.normal()));
        dentropies.push_back(static_cast<float>(0.1 * random.normal()));
      }
  }
  static std::vector<std::vector<TokenId>> make() {
    RandomStream random(3);
    std::vector<std::vector<TokenId>> out(3);
    for (int t = 0; t < 20; ++t) out[0].push_back(static_cast<TokenId>(random.below(256)));
    out[1] = out[0];
    for (auto& text : out)
      while (text.size() < 31) text.push_back(static_cast<TokenId>(random.below(256)));
    return out;
  }
};

struct Outcome {
  std::vector<float> logprobs, entropies, weights;
  double norm = 0;
};

// Two optimizer steps; large ones, so that what is learned stands out from rounding.
Outcome learn(LanguageModel& model, const Compute<float>& compute, const Texts& texts, Recompute recompute,
              MomentPlacement moments = {}) {
  Outcome out{std::vector<float>(texts.targets.size()), std::vector<float>(texts.targets.size()), {}, 0};
  SequencePass<float> pass(model.config(), compute, recompute);
  ppo::OptimizerOptions options;
  options.max_grad_norm = 1;
  Optimizer<float> optimizer(options, model.parameters().num_trainable(), one_process(), moments);
  for (int step = 0; step < 2; ++step) {
    const auto& weights = model.parameters().weights();
    pass.forward(weights, texts.rows, PassKeep::kForBackward);
    pass.token_logprobs(weights, texts.targets, 0.9, out.logprobs, out.entropies);
    pass.token_logprobs_backward(weights, texts.targets, 0.9, texts.dlogprobs, texts.dentropies);
    pass.backward(weights, texts.rows);
    out.norm = optimizer.step(compute, model.parameters(), 0.01).gradient_norm;
  }
  const auto learned = std::as_const(model).parameters().trainable();
  out.weights.assign(learned.begin(), learned.end());
  return out;
}

}  // namespace

TEST_CASE("training on an accelerator learns what the CPU learns", "[device]") {
  const Texts texts;
  ThreadPool pool(1);
  const Compute<float> host(pool, kernels::detect_cpu_isa());
  std::vector<TrainableOptions> variants(3);
  variants[1].mode = TrainableMode::kLastLayers;
  variants[1].last_layers = 1;
  variants[2].mode = TrainableMode::kLora;
  for (const TrainableOptions& trainable : variants) {
    INFO("trainable " << static_cast<int>(trainable.mode));
    LanguageModel on_host = make_trained_model(trainable);
    const auto start = std::as_const(on_host).parameters().trainable();
    const std::vector<float> before(start.begin(), start.end());
    const Outcome expected = learn(on_host, host, texts, Recompute::kNone);
    const auto change = [&](std::vector<float> after) {
      for (std::size_t i = 0; i < after.size(); ++i) after[i] -= before[i];
      return after;
    };
    on_every_accelerator([&](const Accelerator& accelerator) {
      INFO(accelerator.name);
      const Compute<float> device(pool, kernels::detect_cpu_isa(), &accelerator);
      LanguageModel model = make_trained_model(trainable);
      model.parameters().place_on(accelerator);
      const Outcome got = learn(model, device, texts, Recompute::kNone);
      CHECK(distance(got.logprobs, expected.logprobs) < kTolerance);
      CHECK(distance(got.entropies, expected.entropies) < kTolerance);
      CHECK(std::abs(got.norm / expected.norm - 1) < kTolerance);
      // AdamW's first steps are near the sign of the gradient: where that is near zero they may differ.
      CHECK(distance(change(got.weights), change(expected.weights)) < 0.3);
      LanguageModel again = make_trained_model(trainable);
      again.parameters().place_on(accelerator);
      CHECK(learn(again, device, texts, Recompute::kLayers).weights == got.weights);
      LanguageModel offloaded = make_trained_model(trainable);
      offloaded.parameters().place_on(accelerator);
      const MomentPlacement in_pieces{.on_host = true, .piece_elements = 1000};  // the last one is shorter
      CHECK(learn(offloaded, device, texts, Recompute::kNone, in_pieces).weights == got.weights);
    });
  }
}

TEST_CASE("an accelerator's scores and whole distributions are the CPU's", "[device]") {
  const Texts texts;
  ThreadPool pool(1);
  const Compute<float> host(pool, kernels::detect_cpu_isa());
  ModelConfig config = make_trained_model({}).config();
  config.scalar_head = true;
  config.num_labels = 2;
  const std::vector<std::int64_t> rows = {19, 19, 30, 5};  // one row twice, as behind a common prompt
  const std::vector<float> dvalues = {1, -2, 0.5F, 1, 3, -1, 2, 2};
  const auto run = [&](const Compute<float>& compute, Parameters<float>& scores, LanguageModel& policy) {
    struct {
      std::vector<float> values = std::vector<float>(8), log_probs, score_step, policy_step;
    } out;
    SequencePass<float> pass(config, compute);
    pass.forward(scores.weights(), texts.rows, PassKeep::kForBackward);
    pass.scalar_outputs(scores.weights(), rows, out.values);
    pass.scalar_outputs_backward(scores.weights(), rows, dvalues);
    pass.backward(scores.weights(), texts.rows);
    Optimizer<float> optimizer({}, scores.num_trainable());
    out.score_step = {static_cast<float>(optimizer.step(compute, scores, 0.01).gradient_norm)};

    SequencePass<float> words(policy.config(), compute);
    const auto& weights = policy.parameters().weights();
    words.forward(weights, texts.rows, PassKeep::kForBackward);
    out.log_probs.resize(rows.size() * static_cast<std::size_t>(policy.config().vocab_size));
    words.log_distributions(weights, rows, out.log_probs);
    words.distributions_backward(
        weights, rows, [](std::size_t i, std::span<const float> log_probs, std::span<float> gradient) {
          for (std::size_t v = 0; v < gradient.size(); ++v)
            gradient[v] = (v == i ? 1.0F : 0.0F) - std::exp(log_probs[v]);
        });
    words.backward(weights, texts.rows);
    Optimizer<float> steps({}, policy.parameters().num_trainable());
    out.policy_step = {static_cast<float>(steps.step(compute, policy.parameters(), 0.01).gradient_norm)};
    return out;
  };
  LanguageModel plain = make_trained_model({});
  Parameters<float> plain_critic(config, {}, &plain.parameters());
  plain_critic.initialise_score_head(7);
  const auto expected = run(host, plain_critic, plain);
  on_every_accelerator([&](const Accelerator& accelerator) {
    INFO(accelerator.name);
    LanguageModel policy = make_trained_model({});
    policy.parameters().place_on(accelerator);
    Parameters<float> scores(config, {}, &policy.parameters());  // follows it
    scores.initialise_score_head(7);
    const auto got = run({pool, kernels::detect_cpu_isa(), &accelerator}, scores, policy);
    CHECK(distance(got.values, expected.values) < kTolerance);
    CHECK(distance(got.log_probs, expected.log_probs) < kTolerance);
    CHECK(distance(got.score_step, expected.score_step) < kTolerance);
    CHECK(distance(got.policy_step, expected.policy_step) < kTolerance);
  });
}

TEST_CASE("layers that stay on the host give the scores of layers on the device", "[device]") {
  const Texts texts;
  ThreadPool pool(1);
  TrainableOptions last_layers;
  last_layers.mode = TrainableMode::kLastLayers;
  last_layers.last_layers = 3;
  TrainableOptions lora;
  lora.mode = TrainableMode::kLora;
  for (const TrainableOptions& trainable : {TrainableOptions{}, last_layers, lora}) {
    INFO("trainable " << static_cast<int>(trainable.mode));
    on_every_accelerator([&](const Accelerator& accelerator) {
      INFO(accelerator.name);
      const Compute<float> device(pool, kernels::detect_cpu_isa(), &accelerator);
      LanguageModel model = make_trained_model(trainable, 5);
      model.parameters().place_on(accelerator);
      const Parameters<float> there = model.parameters().frozen_copy(),
                              here = model.parameters().frozen_copy(FrozenLayers::kOnHost);
      const std::int64_t layers = there.config().num_layers;
      const ParameterCounts counts = count_parameters(model.config(), trainable);
      const std::int64_t in_layers = trainable.mode == TrainableMode::kLora ? 0 : counts.trainable_in_layers;
      const std::int64_t places =
          in_layers == 0 ? 0 : std::int64_t{LayerStream::kPlaces} * counts.largest_trainable_layer;
      CHECK(there.owned_bytes() - here.owned_bytes() == 2 * static_cast<std::size_t>(in_layers - places));
      SequencePass<float> pass(model.config(), device);
      const auto scores = [&](const Parameters<float>& parameters, std::int64_t trunk) {
        std::vector<float> logprobs(texts.targets.size());
        if (trunk > 0)
          pass.run_trunk(parameters.weights(), texts.rows, trunk);
        else
          pass.drop_trunk();
        pass.forward(parameters.weights(), texts.rows, PassKeep::kNothing);
        pass.token_logprobs(parameters.weights(), texts.targets, 1, logprobs, {});
        return logprobs;
      };
      for (const std::int64_t trunk : {std::int64_t{0}, std::int64_t{2}, std::int64_t{0}, layers}) {
        INFO("trunk of " << trunk << " of " << layers << " layers");
        CHECK(scores(here, trunk) == scores(there, trunk));
      }
    });
  }
}

TEST_CASE("host and accelerator see what the other has written", "[device]") {
  const Texts texts;
  ThreadPool pool(1);
  on_every_accelerator([&](const Accelerator& accelerator) {
    INFO(accelerator.name);
    const Compute<float> device(pool, kernels::detect_cpu_isa(), &accelerator);
    LanguageModel model = make_trained_model({});
    model.parameters().place_on(accelerator);
    const Parameters<float> reference = model.parameters().frozen_copy();
    const Parameters<float> streamed = model.parameters().frozen_copy(FrozenLayers::kOnHost);
    Parameters<float> snapshot = model.parameters().snapshot();
    const auto scores = [&](const Parameters<float>& parameters) {
      SequencePass<float> pass(parameters.config(), device);
      std::vector<float> logprobs(texts.targets.size());
      pass.forward(parameters.weights(), texts.rows, PassKeep::kNothing);
      pass.token_logprobs(parameters.weights(), texts.targets, 1, logprobs, {});
      return logprobs;
    };
    const auto before = scores(model.parameters());
    CHECK(scores(reference) == before);
    CHECK(scores(streamed) == before);
    CHECK(scores(snapshot) == before);
    learn(model, device, texts, Recompute::kNone);
    const auto after = scores(model.parameters());
    CHECK(after != before);
    CHECK(scores(reference) == before);
    CHECK(scores(streamed) == before);
    CHECK(scores(snapshot) == before);
    snapshot.copy_learned(model.parameters());
    CHECK(scores(snapshot) == after);
    CHECK(scores(model.parameters().frozen_copy()) == after);
    const std::uint64_t hash = model.parameters().learned_hash();
    CHECK(hash == kernels::hash_floats(std::as_const(model).parameters().trainable()));
    CHECK(hash == snapshot.learned_hash());
    // Through the host, as a checkpoint goes.
    LanguageModel other = make_trained_model({});
    std::ranges::copy(std::as_const(model).parameters().trainable(), other.parameters().trainable().begin());
    other.parameters().place_on(accelerator);
    CHECK(scores(other.parameters()) == after);
    std::ranges::fill(other.parameters().trainable(), 0.01F);
    CHECK(scores(other.parameters()) != after);
  });
}

// On-policy distillation: exact reverse KL against central differences, and a student that comes near its
// teacher.
#include <algorithm>
#include <cmath>

#include "rlhf/core/error.h"
#include "rlhf/train/divergence.h"
#include "rlhf/train/teacher.h"
#include "rlhf/train/token_distributions.h"
#include "tests/catch.h"
#include "tests/train/gradient_check.h"
#include "tests/train/tiny_run.h"

namespace rlhf {
namespace {

NewModelOptions larger_model() {
  NewModelOptions options = tiny_model();
  options.layers = 3;
  options.hidden_size = 32;
  options.heads = 4;
  options.kv_heads = 2;
  options.intermediate_size = 40;
  options.initial_std = 0.3;
  return options;
}

// log softmax(logits / temperature) at every row, in double.
std::vector<std::vector<double>> double_distributions(const Parameters<double>& parameters,
                                                      const std::vector<TokenId>& tokens,
                                                      double temperature) {
  ThreadPool pool(1);
  SequencePass<double> pass(parameters.config(), Compute<double>(pool, kernels::CpuIsa::kBaseline));
  const PackedRows packed({tokens});
  pass.forward(parameters.weights(), packed, SequencePass<double>::Keep::kNothing);
  const auto V = static_cast<std::size_t>(parameters.config().vocab_size);
  std::vector<std::vector<double>> all;
  for (std::size_t t = 0; t < tokens.size(); ++t) {
    std::vector<double> row(V);
    const std::int64_t at[] = {packed.row(0, static_cast<std::int64_t>(t))};
    pass.log_distributions(parameters.weights(), at, row);
    double sum = 0;
    for (double value : row) sum += std::exp(value / temperature);
    for (double& value : row) value = value / temperature - std::log(sum);
    all.push_back(std::move(row));
  }
  return all;
}

struct KlSetting {
  double temperature = 1;
  double softcap = 0;
};

// Runs Teacher::add_reverse_kl on two sequences and compares with a plain loop and its central differences.
void check_exact_kl(const KlSetting& setting) {
  Lane lane;
  ModelConfig config = LanguageModel::create(tiny_model(), {}, 4).config();
  config.final_softcap = setting.softcap;
  Parameters<float> student(config, {}, nullptr);
  student.initialise(3, 0.4);
  const LanguageModel teacher = LanguageModel::create(larger_model(), {}, 5);
  Parameters<double> student_double = to_double(student, {}),
                     teacher_double = to_double(teacher.parameters(), {});
  const std::vector<std::vector<TokenId>> sequences = {random_tokens(9, 1), random_tokens(14, 2)};
  const PackedRows packed({sequences[0], sequences[1]});
  std::vector<TokenTarget> targets;
  std::vector<double> weights;
  for (std::size_t s = 0; s < 2; ++s)
    for (std::size_t t = 1; t < sequences[s].size(); ++t) {
      targets.push_back({packed.row(s, static_cast<std::int64_t>(t) - 1), sequences[s][t]});
      weights.push_back(t % 3 == 0 ? 0.0 : 0.1 * static_cast<double>(t));
    }
  SequencePass<float> pass(config, lane.context.compute);
  pass.forward(student.weights(), packed, SequencePass<float>::Keep::kForBackward);
  student.zero_gradient();
  Teacher judge(teacher.parameters(), lane.context.compute);
  const double kl =
      judge.add_reverse_kl(pass, student.weights(), packed, targets, weights, setting.temperature);
  pass.backward(student.weights(), packed);

  const auto loss = [&] {
    double sum = 0;
    std::size_t next = 0;
    for (const auto& tokens : sequences) {
      const auto p = double_distributions(student_double, tokens, setting.temperature);
      const auto q = double_distributions(teacher_double, tokens, setting.temperature);
      for (std::size_t t = 1; t < tokens.size(); ++t, ++next)
        for (std::size_t v = 0; v < p[t - 1].size(); ++v)
          sum += weights[next] * std::exp(p[t - 1][v]) * (p[t - 1][v] - q[t - 1][v]);
    }
    return sum;
  };
  CHECK(kl == Approx(loss()).epsilon(1e-4));
  // check_gradient compares weights before and after: a step of size 1 along the gradient.
  const std::vector<float> before(student.trainable().size(), 0.0F);
  Parameters<float> stepped(config, {}, nullptr);
  for (std::size_t i = 0; i < before.size(); ++i) stepped.trainable()[i] = -student.gradient()[i];
  check_gradient(before, stepped, student_double, loss);
}

}  // namespace

TEST_CASE("the exact reverse KL to a teacher and its gradient equal a plain loop in double") {
  check_exact_kl({1, 0});
  check_exact_kl({0.7, 0});
  check_exact_kl({1, 3});
}

TEST_CASE("sums of squared probabilities equal a plain loop in double, at any temperature") {
  Lane lane;
  const LanguageModel model = LanguageModel::create(larger_model(), {}, 5);
  const auto tokens = random_tokens(40, 3);  // more rows than are held at once
  SequencePass<float> pass(model.config(), lane.context.compute);
  const PackedRows packed({tokens});
  pass.forward(model.parameters().weights(), packed, SequencePass<float>::Keep::kNothing);
  std::vector<std::int64_t> rows;
  for (std::size_t t = 0; t < tokens.size(); ++t) rows.push_back(packed.row(0, static_cast<std::int64_t>(t)));
  const Parameters<double> in_double = to_double(model.parameters(), {});
  for (const double temperature : {1.0, 0.5}) {
    const auto sums = sums_of_squared_probabilities(pass, model.parameters().weights(), rows, temperature);
    const auto expected = double_distributions(in_double, tokens, temperature);
    for (std::size_t t = 0; t < tokens.size(); ++t) {
      double sum = 0;
      for (double value : expected[t]) sum += std::exp(2 * value);
      CHECK(sums[t] == Approx(sum).epsilon(1e-4));
    }
  }
}

TEST_CASE("a student comes near its teacher on its own samples, with either estimate (seed 3)") {
  const TinyData data;
  LanguageModel::create(larger_model(), {}, 5).save(data.path("teacher"));
  for (const std::string estimate : {"sampled", "exact"}) {
    // The sampled estimate has the same expectation and a noise of its own, which more samples lower.
    const std::string samples = estimate == "exact" ? "8" : "32";
    const auto options =
        data.options("run_" + estimate,
                     {"stages=[ppo]", "rewards=[]", "ppo.iterations=200", "ppo.reward_model_weight=0",
                      "ppo.critic_init=policy",
                      "ppo.algorithm={samples_per_prompt: " + samples +
                          ", prompts_per_step: 5, epochs: 1, mini_batches: 1, "
                          "critic_update: none, "
                          "value_positions: tokens, kl: {placement: none}, advantage: {form: reward_to_go, "
                          "whitening: none}, "
                          "optimizer: {learning_rate: 0.02, schedule: {shape: constant}}}",
                      "ppo.algorithm.distillation={coefficient: 1, estimate: " + estimate + "}",
                      "distillation.teacher=" + data.path("teacher").string(), "rollout.max_sequences=160"});
    const Attempt run = attempt(options, PipelineSettings::Start::kFresh);
    double early = 0, late = 0;
    for (std::int64_t i = 1; i <= 5; ++i) {
      early += metric(run.steps.at({"ppo", i}), "distillation/kl", 0) / 5;
      late += metric(run.steps.at({"ppo", 195 + i}), "distillation/kl", 0) / 5;
    }
    INFO(estimate << ": KL of the first five batches " << early << ", of the last five " << late);
    CHECK(early > 0.2);
    CHECK(late < (estimate == "exact" ? 0.7 : 0.85) * early);
  }
}

TEST_CASE("a teacher with other tokens is refused") {
  const LanguageModel policy = LanguageModel::create(tiny_model(), {}, 4);
  NewModelOptions letters = tiny_model();
  letters.vocabulary = NewModelOptions::Vocabulary::kLetters;
  CHECK_THROWS_WITH(require_same_tokens("letters", LanguageModel::create(letters, {}, 4), policy),
                    ContainsSubstring("distillation.teacher: letters: has a vocabulary of"));
  CHECK_NOTHROW(require_same_tokens("larger", LanguageModel::create(larger_model(), {}, 4), policy));
  const TinyData data;
  const auto options = data.options("run", {"ppo.algorithm.distillation.coefficient=1",
                                            "distillation.teacher=" + data.path("absent").string()});
  Watcher watcher(nullptr);
  CHECK_THROWS_WITH(Pipeline(options, {}, watcher), ContainsSubstring("absent"));
}

}  // namespace rlhf

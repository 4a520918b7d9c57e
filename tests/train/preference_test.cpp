// Offline preference learning: losses and gradients against plain formulas and central differences in double,
// the closed form of DPO on a problem that can be enumerated, and what a run makes of it.
#include <algorithm>
#include <cmath>
#include <functional>

#include "rlhf/core/error.h"
#include "rlhf/train/preference.h"
#include "tests/catch.h"
#include "tests/train/gradient_check.h"
#include "tests/train/tiny_run.h"

using namespace rlhf;
using Start = PipelineSettings::Start;
using ppo::PreferenceKind;

namespace {

// A prompt without loss and a response with it; one token in the middle of a longer response has none, as a
// tool's result.
TrainingExample example_of(const std::vector<TokenId>& prompt, const std::vector<TokenId>& response) {
  TrainingExample example{prompt, std::vector<std::uint8_t>(prompt.size(), 0)};
  for (std::size_t t = 0; t < response.size(); ++t) {
    example.tokens.push_back(response[t]);
    example.loss_mask.push_back(response.size() < 5 || t != 2);
  }
  return example;
}

// Pairs of different lengths; pairs 0 and 1 have one prompt.
TaskData four_pairs() {
  TaskData data;
  for (std::size_t i = 0; i < 4; ++i) {
    const auto prompt = random_tokens(6, i == 1 ? 0 : i);
    data.train_pairs.push_back({example_of(prompt, random_tokens(3 + 2 * i, 20 + i)),
                                example_of(prompt, random_tokens(8 - 2 * i, 30 + i)), 0, "t"});
  }
  return data;
}

struct PlainSum {
  double log_prob = 0, tokens = 0;
  double mean() const { return log_prob / tokens; }
};

PlainSum plain_sum(const Parameters<double>& parameters, const TrainingExample& example) {
  const auto log_probs = double_logprobs(parameters, example.tokens);
  PlainSum sum;
  for (std::size_t t = 1; t < example.tokens.size(); ++t)
    if (example.loss_mask[t]) {
      sum.log_prob += log_probs[t - 1];
      ++sum.tokens;
    }
  return sum;
}

// What a plain loop knows of a pair.
struct PlainPair {
  PlainSum chosen, rejected;
  double reference_chosen = 0, reference_rejected = 0;
  double log_ratio_chosen() const { return chosen.log_prob - reference_chosen; }
  double log_ratio_rejected() const { return rejected.log_prob - reference_rejected; }
  double margin() const { return log_ratio_chosen() - log_ratio_rejected(); }
};
using PlainLoss = std::function<double(const std::vector<PlainPair>&)>;

double mean_over(const std::vector<PlainPair>& pairs, const std::function<double(const PlainPair&)>& loss) {
  double sum = 0;
  for (const PlainPair& pair : pairs) sum += loss(pair);
  return sum / static_cast<double>(pairs.size());
}

double log_sigmoid(double x) {
  return -std::log1p(std::exp(-x));
}

double mean_chosen_nll(const std::vector<PlainPair>& pairs) {
  double sum = 0, tokens = 0;
  for (const PlainPair& pair : pairs) {
    sum -= pair.chosen.log_prob;
    tokens += pair.chosen.tokens;
  }
  return sum / tokens;
}

struct Case {
  std::string name;
  ppo::PreferenceOptions options;
  PlainLoss loss;
};

Case case_of(const std::string& name, PreferenceKind kind, double beta, const PlainLoss& loss) {
  Case out{name, {}, loss};
  out.options.terms = {{kind, 1}};
  out.options.beta = beta;
  return out;
}

std::vector<Case> loss_cases() {
  std::vector<Case> cases;
  cases.push_back(case_of("DPO", PreferenceKind::kSigmoid, 0.3, [](const auto& pairs) {
    return mean_over(pairs, [](const PlainPair& p) { return -log_sigmoid(0.3 * p.margin()); });
  }));
  cases.push_back(case_of("cDPO", PreferenceKind::kConservative, 0.3, [](const auto& pairs) {
    return mean_over(pairs, [](const PlainPair& p) {
      return -0.9 * log_sigmoid(0.3 * p.margin()) - 0.1 * log_sigmoid(-0.3 * p.margin());
    });
  }));
  cases.back().options.label_smoothing = 0.1;
  cases.push_back(case_of("hinge", PreferenceKind::kHinge, 0.1, [](const auto& pairs) {
    return mean_over(pairs, [](const PlainPair& p) { return std::max(0.0, 1 - 0.1 * p.margin()); });
  }));
  cases.push_back(case_of("IPO", PreferenceKind::kIpo, 0.2, [](const auto& pairs) {
    return mean_over(pairs, [](const PlainPair& p) {
      const double difference =
          p.log_ratio_chosen() / p.chosen.tokens - p.log_ratio_rejected() / p.rejected.tokens;
      return std::pow(difference - 1 / 0.4, 2);
    });
  }));
  cases.push_back(case_of("SimPO", PreferenceKind::kSimpo, 2, [](const auto& pairs) {
    return mean_over(pairs, [](const PlainPair& p) {
      return -log_sigmoid(2 * (p.chosen.mean() - p.rejected.mean()) - 0.5);
    });
  }));
  cases.push_back(case_of("ORPO", PreferenceKind::kOrpo, 0.4, [](const auto& pairs) {
    const auto log_odds = [](double x) { return x - std::log(1 - std::exp(x)); };
    return mean_chosen_nll(pairs) + mean_over(pairs, [&](const PlainPair& p) {
             return -0.4 * log_sigmoid(log_odds(p.chosen.mean()) - log_odds(p.rejected.mean()));
           });
  }));
  cases.back().options.terms.push_back({PreferenceKind::kSft, 1});
  cases.push_back(case_of("AOT", PreferenceKind::kAot, 0.3, [](const auto& pairs) {
    std::vector<double> policy, reference;
    for (const PlainPair& p : pairs) {
      policy.push_back(p.chosen.log_prob - p.rejected.log_prob);
      reference.push_back(p.reference_chosen - p.reference_rejected);
    }
    std::ranges::sort(policy);
    std::ranges::sort(reference);
    double sum = 0;
    for (std::size_t i = 0; i < policy.size(); ++i) sum -= log_sigmoid(0.3 * (policy[i] - reference[i]));
    return sum / static_cast<double>(policy.size());
  }));
  return cases;
}

// Moves all weights a little, the same way every time: a policy that is no longer the reference.
void disturb(std::span<float> weights) {
  RandomStream random(4711);
  for (float& weight : weights) weight += static_cast<float>(0.03 * random.normal());
}

}  // namespace

TEST_CASE("the gradient of preference losses equals central differences, in one micro-batch and in several") {
  const TaskData data = four_pairs();
  std::vector<const TrainingPair*> pairs;
  for (const TrainingPair& pair : data.train_pairs) pairs.push_back(&pair);
  for (const Case& c : loss_cases()) {
    for (const std::int64_t max_tokens : {1000, 30}) {
      INFO(c.name << ", passes of at most " << max_tokens << " tokens");
      Lane lane;
      LanguageModel model = LanguageModel::create(tiny_model(), {}, 4);
      Parameters<float>& policy = model.parameters();
      const Parameters<double> reference = to_double(policy, {});
      SequencePass<float> pass(policy.config(), lane.context.compute);
      PairLoss loss(c.options, {max_tokens}, pass);
      const PairBatch batch = loss.refer(pairs, policy.weights());
      CHECK(batch.reference_chosen.size() == (ppo::needs_reference(c.options) ? 4 : 0));
      disturb(policy.trainable());
      Parameters<double> in_double = to_double(policy, {});
      std::vector<double> reference_chosen, reference_rejected;
      for (const TrainingPair* pair : pairs) {
        reference_chosen.push_back(plain_sum(reference, pair->chosen).log_prob);
        reference_rejected.push_back(plain_sum(reference, pair->rejected).log_prob);
      }
      const auto plain = [&] {
        std::vector<PlainPair> known;
        for (std::size_t i = 0; i < pairs.size(); ++i)
          known.push_back({plain_sum(in_double, pairs[i]->chosen), plain_sum(in_double, pairs[i]->rejected),
                           reference_chosen[i], reference_rejected[i]});
        return known;
      };
      const PairMeasure measure = loss.train(batch, policy.weights());
      const auto known = plain();
      CHECK(measure.loss == Approx(c.loss(known)).epsilon(1e-5));
      CHECK(measure.loss == Approx(loss.measure(batch, policy.weights()).loss).epsilon(1e-12));
      CHECK(measure.chosen_log_prob ==
            Approx(mean_over(known, [](const PlainPair& p) { return p.chosen.log_prob; })).epsilon(1e-5));
      const bool referred = ppo::needs_reference(c.options);
      CHECK(measure.chosen_reward == Approx(c.options.beta * mean_over(known,
                                                                       [&](const PlainPair& p) {
                                                                         return referred
                                                                                    ? p.log_ratio_chosen()
                                                                                    : p.chosen.mean();
                                                                       }))
                                         .epsilon(1e-4)
                                         .margin(1e-5));
      // check_gradient reads the gradient as the difference of two weight vectors.
      std::vector<float> gradient(policy.gradient().begin(), policy.gradient().end());
      std::ranges::fill(policy.trainable(), 0.0f);
      check_gradient(gradient, policy, in_double, [&] { return c.loss(plain()); });
    }
  }
}

TEST_CASE("KTO's mismatched examples have the response to another prompt, the nearest one before") {
  const auto labelled = [](const std::vector<TokenId>& prompt, const std::vector<TokenId>& response) {
    return LabelledExample{example_of(prompt, response), true};
  };
  const std::vector<LabelledExample> examples = {labelled({1, 2}, {10}), labelled({1, 2}, {11, 12}),
                                                 labelled({3}, {13, 14, 15}), labelled({1, 2, 3}, {16})};
  const auto mismatched = make_mismatched(examples, 64);
  REQUIRE(mismatched.size() == 4);
  CHECK(mismatched[0].tokens == std::vector<TokenId>{1, 2, 16});
  CHECK(mismatched[1].tokens == std::vector<TokenId>{1, 2, 16});  // example 0 answers the same prompt
  CHECK(mismatched[2].tokens == std::vector<TokenId>{3, 11, 12});
  CHECK(mismatched[2].loss_mask == std::vector<std::uint8_t>{0, 1, 1});
  CHECK(mismatched[3].tokens == std::vector<TokenId>{1, 2, 3, 13, 14, 15});
  // In five tokens the last prompt has no room for three more.
  CHECK(make_mismatched(examples, 5)[3].tokens == std::vector<TokenId>{1, 2, 3, 11, 12});
  CHECK_THROWS_WITH(
      make_mismatched({examples[0], examples[1]}, 64),
      ContainsSubstring("example 1 of 2 finds none that fits the model's context of 64 tokens") &&
          ContainsSubstring("apo_zero_unpaired"));
}

TEST_CASE("the gradient of unpaired losses equals central differences, in one micro-batch and in several") {
  std::vector<LabelledExample> examples;
  for (std::size_t i = 0; i < 5; ++i)
    examples.push_back({example_of(random_tokens(4, i), random_tokens(3 + 2 * i, 20 + i)), i % 2 == 0});
  const std::vector<TrainingExample> mismatched = make_mismatched(examples, 64);
  std::vector<const LabelledExample*> chosen;
  std::vector<const TrainingExample*> others;
  for (const LabelledExample& example : examples) chosen.push_back(&example);
  for (const TrainingExample& example : mismatched) others.push_back(&example);
  for (const auto kind : {ppo::UnpairedKind::kKto, ppo::UnpairedKind::kApoZero})
    for (const std::int64_t max_tokens : {1000, 25}) {
      const bool kto = kind == ppo::UnpairedKind::kKto;
      INFO((kto ? "KTO" : "APO") << ", passes of at most " << max_tokens << " tokens");
      Lane lane;
      LanguageModel model = LanguageModel::create(tiny_model(), {}, 4);
      Parameters<float>& policy = model.parameters();
      const Parameters<double> reference = to_double(policy, {});
      SequencePass<float> pass(policy.config(), lane.context.compute);
      ppo::UnpairedOptions options;
      options.kind = kind;
      options.beta = 0.3;
      options.undesirable_weight = 1.5;
      UnpairedLoss loss(options, {max_tokens}, pass);
      const LabelledBatch batch =
          loss.refer(chosen, kto ? others : std::vector<const TrainingExample*>{}, policy.weights());
      disturb(policy.trainable());
      Parameters<double> in_double = to_double(policy, {});
      const auto log_ratio = [&](const TrainingExample& example, double before) {
        return plain_sum(in_double, example).log_prob - before;
      };
      std::vector<double> before;
      for (const LabelledExample& example : examples)
        before.push_back(plain_sum(reference, example.example).log_prob);
      // The reference point is a number: no gradient flows through it.
      double kl = 0;
      for (const TrainingExample& example : mismatched)
        if (kto) kl += log_ratio(example, plain_sum(reference, example).log_prob) / 5;
      kl = std::max(kl, 0.0);
      const auto plain = [&] {
        double sum = 0;
        for (std::size_t i = 0; i < examples.size(); ++i) {
          const double z = 0.3 * (log_ratio(examples[i].example, before[i]) - kl);
          sum += examples[i].desirable ? 1 - 1 / (1 + std::exp(-z)) : 1.5 * (1 - 1 / (1 + std::exp(z)));
        }
        return sum / 5;
      };
      const LabelledMeasure measure = loss.train(batch, policy.weights());
      CHECK(measure.loss == Approx(plain()).epsilon(1e-5));
      CHECK(measure.kl == Approx(kl).epsilon(1e-4));
      CHECK(measure.desirable == 3);
      CHECK(measure.undesirable == 2);
      std::vector<float> gradient(policy.gradient().begin(), policy.gradient().end());
      std::ranges::fill(policy.trainable(), 0.0f);
      check_gradient(gradient, policy, in_double, plain);
    }
}

TEST_CASE("DPO reaches its closed form: policy / reference is proportional to exp(reward / beta)") {
  // Rewards log 1, log 2, log 4: under Bradley-Terry, b beats a in 2 of 3 comparisons, c beats b in 2 of 3
  // and c beats a in 4 of 5. These comparisons are the data, so its empirical optimum is the closed form.
  const std::vector<TokenId> prompt = {5, 6};
  const std::vector<TrainingExample> responses = {example_of(prompt, {10, 20}), example_of(prompt, {10, 21}),
                                                  example_of(prompt, {11, 20})};
  TaskData data;
  const auto compare = [&](std::size_t better, std::size_t worse, int wins) {
    for (int i = 0; i < wins; ++i) data.train_pairs.push_back({responses[better], responses[worse], 0, "t"});
    data.train_pairs.push_back({responses[worse], responses[better], 0, "t"});
  };
  compare(1, 0, 2);
  compare(2, 1, 2);
  compare(2, 0, 4);
  Lane lane;
  LanguageModel model = LanguageModel::create(tiny_model(), {}, 4);
  const Parameters<double> reference = to_double(model.parameters(), {});
  PreferenceStageOptions options;
  options.loss.beta = 0.5;
  options.max_steps = 400;
  options.pairs_per_step = static_cast<std::int64_t>(data.train_pairs.size());
  options.optimizer.learning_rate = 0.003;
  PreferenceStage(model, data, options, lane.context).run();
  const Parameters<double> policy = to_double(model.parameters(), {});
  std::vector<double> log_ratios;
  for (const TrainingExample& response : responses)
    log_ratios.push_back(plain_sum(policy, response).log_prob - plain_sum(reference, response).log_prob);
  // Only differences are determined: DPO says nothing about responses that no pair has.
  CHECK(log_ratios[1] - log_ratios[0] == Approx(std::log(2.0) / 0.5).margin(2e-3));
  CHECK(log_ratios[2] - log_ratios[0] == Approx(std::log(4.0) / 0.5).margin(2e-3));
}

TEST_CASE("before the first step the policy is the reference: loss log 2, rewards 0") {
  Lane lane;
  LanguageModel model = LanguageModel::create(tiny_model(), {}, 4);
  TaskData data = four_pairs();
  data.held_out_pairs = data.train_pairs;
  PreferenceStageOptions options;
  options.max_steps = 40;
  options.pairs_per_step = 4;
  options.optimizer.learning_rate = 0.003;
  PreferenceStage stage(model, data, options, lane.context);
  const PairMeasure before = stage.judge_held_out();
  CHECK(before.loss == Approx(std::log(2.0)).epsilon(1e-12));
  CHECK(before.chosen_reward == 0);
  stage.run();
  CHECK(metric(lane.watcher.steps.at({"preference", 1}), "loss", 0) == Approx(std::log(2.0)).epsilon(1e-12));
  const PairMeasure after = stage.judge_held_out();
  CHECK(after.pairs == 4);
  CHECK(after.accuracy() == 1);
  CHECK(after.loss < 0.5 * before.loss);
  CHECK(after.chosen_reward > after.rejected_reward);
}

TEST_CASE("a run with DPO learns its pairs and says how well it orders those held out") {
  const TinyData data;
  const auto options =
      data.options("run", {"stages=[sft, preference, eval]", "preference.max_steps=30",
                           "preference.pairs_per_step=5", "preference.optimizer.learning_rate=0.003"});
  const Attempt run = attempt(options, Start::kFresh);
  CHECK(metric(run.steps.at({"preference", 1}), "loss", 0) == Approx(std::log(2.0)));
  CHECK(metric(run.steps.at({"preference", 30}), "loss", 1) < 0.3);
  CHECK(metric(run.steps.at({"preference", 30}), "accuracy", 0) == 1);
  CHECK(metric(run.report.metrics, "preference/pairs", 0) == 5);
  CHECK(metric(run.report.metrics, "preference/accuracy", 0) == 1);
  CHECK(metric(run.report.metrics, "preference/margin", 0) > 0.5);
  CHECK(run.steps.contains({"eval preference", 1}));
}

TEST_CASE("a run with KTO learns from pairs taken apart, and from a file of labels") {
  const TinyData data;
  std::string labels;
  for (const char* subject : {"rates", "bonds", "gold", "oil", "cash"})
    for (const char* label : {"true", "false"})
      labels += std::string(R"({"prompt": "on )") + subject + R"(: ", "response": ")" +
                (*label == 't' ? "sell" : std::string("buy ") + subject) + R"(", "label": )" + label + "}\n";
  const auto file = data.folder().write("labels.jsonl", labels);
  for (const std::string& source :
       {std::string("pairs_file=") + data.path("pairs.jsonl").string(), "labels_file=" + file.string()}) {
    INFO(source);
    const auto options =
        data.options("run_" + source.substr(0, 5),
                     {"stages=[sft, preference]", "data.pairs_file=''", "data." + source,
                      "preference.max_steps=40", "preference.pairs_per_step=5",
                      "preference.unpaired.kind=kto", "preference.optimizer.learning_rate=0.003"});
    const Attempt run = attempt(options, Start::kFresh);
    // Rewards are 0 at first: every sigmoid is a half.
    CHECK(metric(run.steps.at({"preference", 1}), "loss", 0) == Approx(0.5));
    CHECK(metric(run.steps.at({"preference", 1}), "kl", 1) == 0);
    CHECK(metric(run.steps.at({"preference", 40}), "loss", 1) < 0.45);
    CHECK(metric(run.steps.at({"preference", 40}), "margin", 0) > 0.5);
    CHECK(metric(run.report.metrics, "preference/accuracy", 0) == 1);
  }
}

TEST_CASE("a preference stage says which data or option it cannot use") {
  Lane lane;
  LanguageModel model = LanguageModel::create(tiny_model(), {}, 4);
  const PreferenceStageOptions options;
  const auto make = [&](const TaskData& data) { PreferenceStage(model, data, options, lane.context); };
  TaskData data;
  CHECK_THROWS_WITH(make(data), "preference: there are no pairs");
  data = four_pairs();
  data.train_pairs[2].rejected.loss_mask.assign(data.train_pairs[2].rejected.tokens.size(), 0);
  CHECK_THROWS_WITH(make(data),
                    "preference: the rejected response of training pair 3 has no token to learn from");
  data = four_pairs();
  data.held_out_pairs = data.train_pairs;
  data.held_out_pairs[0].chosen = example_of(random_tokens(5, 1), random_tokens(70, 2));
  CHECK_THROWS_WITH(
      make(data),
      "preference: the chosen response of held-out pair 1 has 75 tokens with its prompt, the model's "
      "context is 64");

  const TinyData files;
  const auto parse = [&](std::vector<std::string> overrides) {
    overrides.insert(overrides.begin(), "stages=[preference]");
    return files.options("run", overrides);
  };
  CHECK_THROWS_WITH(
      parse({"data.pairs_file=''"}),
      ContainsSubstring("data.pairs_file") && ContainsSubstring("the stage 'preference' needs this file"));
  CHECK_THROWS_WITH(parse({"preference.loss.terms=[]"}),
                    ContainsSubstring("preference.loss.terms") && ContainsSubstring("at least one term"));
  CHECK_THROWS_WITH(parse({"preference.loss.terms=[{kind: exo_pair}]"}),
                    ContainsSubstring("preference.loss.label_smoothing") &&
                        ContainsSubstring("exo_pair needs a value above 0"));
  CHECK_THROWS_WITH(parse({"preference.loss.label_smoothing=0.1"}),
                    ContainsSubstring("preference.loss.label_smoothing") &&
                        ContainsSubstring("no term uses it; conservative, robust"));
  CHECK_THROWS_WITH(parse({"data.labels_file=x"}),
                    ContainsSubstring("data.labels_file") && ContainsSubstring("only preference.unpaired"));
  CHECK_THROWS_WITH(parse({"preference.loss.terms=[{kind: dpo}]"}), ContainsSubstring("sigmoid"));
  CHECK_THROWS_WITH(files.options("run", {"stages=[preference, reward]"}),
                    ContainsSubstring("'reward' is out of order"));
  CHECK_THROWS_WITH(
      config::parse<RunOptions>("model: {new: {vocabulary: letters}}\ndata: {source: random_walks}\n"
                                "stages: [preference]\n",
                                "run.yaml"),
      ContainsSubstring("random_walks has no preference pairs for the stage 'preference'"));
}

#include "rlhf/verify/model_vectors.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>

#include "rlhf/core/error.h"
#include "rlhf/model/parameters.h"
#include "rlhf/model/sequence_pass.h"
#include "rlhf/model/weight_file.h"
#include "rollout/engine/rollout_engine.h"

namespace rlhf {
namespace {

using nlohmann::json;

// The reference packages themselves differ by up to 3e-5 in the logits of these models (float32, other
// summation).
constexpr double kAbsolute = 3e-5, kRelative = 1e-4;
// Greedy steps whose best two logits are closer than this may go either way.
constexpr double kGreedyGap = 1e-3;

class Checker {
 public:
  explicit Checker(VerifyResult& result) : result_(result) {}

  void compare(const std::string& what, double actual, double expected, double absolute = kAbsolute) {
    const double error = std::abs(actual - expected) / std::max(1.0, std::abs(expected));
    if (std::isfinite(error)) worst_ = std::max(worst_, error);
    if (!(std::abs(actual - expected) <= absolute + kRelative * std::abs(expected)))
      miss(concat(what, " is ", actual, ", expected ", expected));
  }
  void compare_all(const std::string& what, const float* actual, const json& expected,
                   double absolute = kAbsolute) {
    for (std::size_t i = 0; i < expected.size(); ++i)
      compare(concat(what, "[", i, "]"), static_cast<double>(actual[i]), expected[i].get<double>(), absolute);
  }
  void miss(const std::string& message) {
    if (first_miss_.empty()) first_miss_ = message;
  }
  void end_case() {
    ++result_.cases;
    result_.largest_error = std::max(result_.largest_error, worst_);
    if (!first_miss_.empty()) {
      ++result_.failures;
      result_.messages.push_back(first_miss_);
    }
    first_miss_.clear();
  }

 private:
  VerifyResult& result_;
  std::string first_miss_;
  double worst_ = 0;
};

struct LoadedModel {
  Parameters<float> parameters;
  ThreadPool pool{1};
  Compute<float> compute{pool, kernels::detect_cpu_isa()};
  SequencePass<float> pass;

  LoadedModel(const std::filesystem::path& weights, const ModelConfig& config)
      : parameters(config, {}, nullptr), pass(config, compute) {
    parameters.load(*WeightFile::open(weights));
  }

  // Logits [T, V] (or head outputs) of every position.
  std::vector<float> all_logits(const std::vector<TokenId>& tokens) {
    const PackedRows rows({tokens});
    const auto& weights = parameters.weights();
    const float* hidden = pass.forward(weights, rows, SequencePass<float>::Keep::kNothing);
    std::vector<float> logits(tokens.size() * static_cast<std::size_t>(weights.head.N));
    DecoderRunner<float> runner(weights.config, compute);
    runner.linear(weights.head, rows.rows().size(), hidden, logits.data(), false);
    const double cap = weights.config.final_softcap;
    if (cap > 0)
      for (float& x : logits) x = static_cast<float>(cap * std::tanh(x / cap));
    return logits;
  }

  std::vector<TokenId> greedy(const std::vector<TokenId>& prompt, std::int64_t count) {
    RolloutEngineOptions options;
    options.num_blocks = RolloutEngine::blocks_for(1, static_cast<std::int64_t>(prompt.size()) + count);
    RolloutEngine engine(parameters.config(), compute, options, {});
    GenerationRequest request;
    request.prompt = prompt;
    request.sampling.temperature = 0;
    request.stop.max_new_tokens = count;
    engine.submit(std::move(request));
    while (engine.busy()) engine.step(parameters.weights(), 0);
    return engine.try_take()->tokens;
  }
};

void check_greedy(LoadedModel& model, const json& greedy, Checker& check) {
  const auto expected = greedy.at("tokens").get<std::vector<TokenId>>();
  const auto tokens = model.greedy(greedy.at("prompt").get<std::vector<TokenId>>(),
                                   static_cast<std::int64_t>(expected.size()));
  for (std::size_t i = 0; i < expected.size() && i < tokens.size(); ++i) {
    if (tokens[i] == expected[i]) continue;
    if (greedy.at("top1_minus_top2")[i].get<double>() >= kGreedyGap)
      check.miss(concat("greedy token ", i, " is ", tokens[i], ", expected ", expected[i]));
    break;  // after a near tie the continuations are different texts
  }
  if (tokens.size() != expected.size())
    check.miss(concat("greedy continuation has ", tokens.size(), " tokens, expected ", expected.size()));
  check.end_case();
}

void check_logprobs(LoadedModel& model, const std::vector<std::vector<TokenId>>& sequences,
                    const json& expected, double temperature, Checker& check) {
  for (std::size_t s = 0; s < sequences.size(); ++s) {
    const PackedRows rows({sequences[s]});
    std::vector<TokenTarget> targets;
    for (std::size_t t = 1; t < sequences[s].size(); ++t)
      targets.push_back({static_cast<std::int64_t>(t) - 1, sequences[s][t]});
    std::vector<float> logprobs(targets.size());
    model.pass.forward(model.parameters.weights(), rows, SequencePass<float>::Keep::kNothing);
    model.pass.token_logprobs(model.parameters.weights(), targets, temperature, logprobs, {});
    if (expected.at(s).size() != logprobs.size())
      check.miss("log-prob counts differ");
    else
      check.compare_all(concat("logprobs_temperature_", temperature, "[", s, "]"), logprobs.data(),
                        expected[s]);
  }
  check.end_case();
}

void check_gradients(LoadedModel& model, const json& expected, Checker& check) {
  const auto compare_tensor = [&](const std::string& name, const auto& visit) {
    const auto* entry = model.parameters.find(name);
    if (!entry) return check.miss("the model has no tensor named " + name);
    visit(*entry);
  };
  for (const auto& [name, value] : expected.at("grad_l2").items())
    compare_tensor(name, [&](const auto& entry) {
      double sum = 0;
      for (std::int64_t i = 0; i < entry.spec.num_elements(); ++i)
        sum += static_cast<double>(entry.gradient[i]) * static_cast<double>(entry.gradient[i]);
      check.compare("grad_l2 of " + name, std::sqrt(sum), value.template get<double>());
    });
  check.end_case();
  for (const auto& [name, value] : expected.at("grads").items()) {
    compare_tensor(name, [&](const auto& entry) {
      if (value[0].is_array()) {
        const std::int64_t columns = entry.spec.shape[entry.spec.transposed ? 0 : 1];
        for (std::size_t r = 0; r < value.size() && !entry.spec.transposed; ++r)
          check.compare_all(concat("gradient of ", name, "[", r, "]"),
                            entry.gradient + static_cast<std::int64_t>(r) * columns, value[r], 1e-5);
        for (std::size_t i = 0; i < value.size() && entry.spec.transposed; ++i)
          for (std::size_t o = 0; o < value[i].size(); ++o)
            check.compare(
                concat("gradient of ", name, "[", i, ",", o, "]"),
                static_cast<double>(
                    entry.gradient[static_cast<std::int64_t>(o) * columns + static_cast<std::int64_t>(i)]),
                value[i][o].template get<double>(), 1e-5);
      } else {
        check.compare_all("gradient of " + name, entry.gradient, value, 1e-5);
      }
    });
    check.end_case();
  }
}

// Mean negative log-likelihood of next tokens over all listed sequences, and its gradient.
void check_mean_nll(LoadedModel& model, const std::vector<std::vector<TokenId>>& sequences,
                    const json& expected, Checker& check) {
  std::vector<std::span<const TokenId>> packed;
  for (const json& index : expected.at("sequences")) packed.push_back(sequences.at(index.get<std::size_t>()));
  const PackedRows rows(packed);
  std::vector<TokenTarget> targets;
  for (std::size_t s = 0; s < packed.size(); ++s)
    for (std::size_t t = 1; t < packed[s].size(); ++t)
      targets.push_back({rows.row(s, static_cast<std::int64_t>(t) - 1), packed[s][t]});
  const auto& weights = model.parameters.weights();
  std::vector<float> logprobs(targets.size()),
      gradient(targets.size(), -1.0f / static_cast<float>(targets.size()));
  model.parameters.zero_gradient();
  model.pass.forward(weights, rows, SequencePass<float>::Keep::kForBackward);
  model.pass.token_logprobs(weights, targets, 1, logprobs, {});
  double sum = 0;
  for (float lp : logprobs) sum -= static_cast<double>(lp);
  check.compare("mean_nll", sum / static_cast<double>(targets.size()), expected.at("value").get<double>());
  check.end_case();
  model.pass.token_logprobs_backward(weights, targets, 1, gradient, {});
  model.pass.backward(weights, rows);
  check_gradients(model, expected, check);
}

void check_known_keys(const json& object, const std::set<std::string>& known, Checker& check) {
  for (const auto& [key, value] : object.items())
    if (!known.count(key)) check.miss("unknown key '" + key + "' in expected.json");
  check.end_case();
}

void verify_language_model(const std::filesystem::path& directory, const ModelConfig& config,
                           const json& expected, Checker& check) {
  LoadedModel model(directory, config);
  const auto sequences = expected.at("sequences").get<std::vector<std::vector<TokenId>>>();
  const auto V = static_cast<std::size_t>(config.vocab_size);
  for (const auto& [index, logits] : expected.at("logits_of_sequence").items()) {
    const auto actual = model.all_logits(sequences.at(std::stoul(index)));
    for (std::size_t t = 0; t < logits.size(); ++t)
      check.compare_all(concat("logits_of_sequence ", index, " position ", t), actual.data() + t * V,
                        logits[t]);
    check.end_case();
  }
  for (std::size_t s = 0; s < sequences.size(); ++s) {
    const auto actual = model.all_logits(sequences[s]);
    check.compare_all(concat("last_logits ", s), actual.data() + (sequences[s].size() - 1) * V,
                      expected.at("last_logits").at(s));
    // The same model computed in bfloat16 by the reference: 8 bits of mantissa through every layer.
    if (expected.contains("last_logits_bfloat16_compute"))
      for (std::size_t v = 0; v < V; ++v)
        if (!(std::abs(static_cast<double>(actual[(sequences[s].size() - 1) * V + v]) -
                       expected["last_logits_bfloat16_compute"].at(s).at(v).get<double>()) < 0.2))
          check.miss(
              concat("last_logits_bfloat16_compute ", s, " differs by more than bfloat16 can explain"));
    check.end_case();
  }
  for (const auto& [key, value] : expected.items()) {
    const std::string prefix = "logprobs_temperature_";
    if (key.starts_with(prefix))
      check_logprobs(model, sequences, value, std::stod(key.substr(prefix.size())), check);
  }
  for (const json& greedy : expected.at("greedy")) check_greedy(model, greedy, check);
  check_mean_nll(model, sequences, expected.at("mean_nll"), check);
}

void verify_reward_model(const std::filesystem::path& directory, const ModelConfig& config,
                         const json& expected, Checker& check) {
  LoadedModel model(directory, config);
  const auto sequences = expected.at("sequences").get<std::vector<std::vector<TokenId>>>();
  for (std::size_t s = 0; s < sequences.size(); ++s) {
    const auto scores = model.all_logits(sequences[s]);
    const json& all = expected.at("scores_all_positions").at(s);
    for (std::size_t t = 0; t < all.size(); ++t)
      check.compare(concat("score ", s, " at ", t), static_cast<double>(scores[t]),
                    all[t].is_array() ? all[t][0].get<double>() : all[t].get<double>());
    const json& score = expected.at("scores").at(s);
    check.compare(concat("score ", s), static_cast<double>(scores.back()),
                  score.is_array() ? score[0].get<double>() : score.get<double>());
    check.end_case();
  }
  const json& pair = expected.at("pair_loss");
  const PackedRows rows({sequences.at(2), sequences.at(3)});
  const std::vector<std::int64_t> last = {rows.last_row(0), rows.last_row(1)};
  std::vector<float> values(2);
  const auto& weights = model.parameters.weights();
  model.parameters.zero_gradient();
  model.pass.forward(weights, rows, SequencePass<float>::Keep::kForBackward);
  model.pass.scalar_outputs(weights, last, values);
  const double margin = static_cast<double>(values[0]) - static_cast<double>(values[1]);
  check.compare("pair_loss", std::log1p(std::exp(-margin)), pair.at("value").get<double>());
  check.end_case();
  const auto slope = static_cast<float>(-1 / (1 + std::exp(margin)));
  model.pass.scalar_outputs_backward(weights, last, std::vector<float>{slope, -slope});
  model.pass.backward(weights, rows);
  check_gradients(model, pair, check);
}

void verify_gguf(const std::filesystem::path& directory, const json& expected, Checker& check) {
  const auto sequences = expected.at("sequences").get<std::vector<std::vector<TokenId>>>();
  for (const auto& [name, file] : expected.at("files").items()) {
    const ModelConfig config = load_model_config(directory / name);
    LoadedModel model(directory / name, config);
    const auto V = static_cast<std::size_t>(config.vocab_size);
    for (std::size_t s = 0; s < sequences.size(); ++s) {
      // A long sequence lists its last positions only.
      const auto actual = model.all_logits(sequences[s]);
      const json& listed = file.at("logits").at(s);
      for (std::size_t t = 0; t < listed.size(); ++t)
        check.compare_all(concat(name, " logits ", s, " listed position ", t),
                          actual.data() + (sequences[s].size() - listed.size() + t) * V, listed[t]);
    }
    check.end_case();
    for (const json& greedy : file.at("greedy").is_array() ? file["greedy"] : json::array({file["greedy"]}))
      check_greedy(model, greedy, check);
  }
}

}  // namespace

VerifyResult verify_model_directory(const std::filesystem::path& directory) {
  VerifyResult result;
  result.file = directory.filename().string();
  Checker check(result);
  try {
    std::ifstream stream(directory / "expected.json");
    if (!stream) fail<IoError>((directory / "expected.json").string(), ": cannot be opened");
    const json expected = json::parse(stream);
    const std::string family = expected.at("family");
    if (family == "gguf") {
      check_known_keys(expected, {"format", "family", "doc", "source", "sequences", "files", "original"},
                       check);
      verify_gguf(directory, expected, check);
      return result;
    }
    std::vector<ModelConfig> configs = {load_model_config(directory)};
    if (std::filesystem::exists(directory / "config_legacy.json")) {
      std::ifstream legacy(directory / "config_legacy.json");
      configs.push_back(parse_hf_config(json::parse(legacy), (directory / "config_legacy.json").string()));
    }
    for (const ModelConfig& config : configs) {
      if (family == "model") {
        check_known_keys(expected,
                         {"format", "family", "doc", "source", "compute_dtype", "sequences",
                          "logprobs_temperature_1", "logprobs_temperature_0.7", "logits_of_sequence",
                          "last_logits", "max_abs_logit_difference_to_float64_run", "greedy", "mean_nll",
                          "last_logits_bfloat16_compute", "note"},
                         check);
        verify_language_model(directory, config, expected, check);
      } else if (family == "reward_model") {
        check_known_keys(expected,
                         {"format", "family", "doc", "source", "compute_dtype", "sequences", "scores",
                          "scores_all_positions", "pair_loss", "max_abs_logit_difference_to_float64_run"},
                         check);
        verify_reward_model(directory, config, expected, check);
      } else {
        fail<InvalidArgument>("unknown family '", family, "'");
      }
    }
  } catch (const std::exception& error) {
    check.miss(error.what());
    check.end_case();
  }
  return result;
}

}  // namespace rlhf

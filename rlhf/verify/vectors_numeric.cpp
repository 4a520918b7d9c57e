// Token distributions, learning-rate schedules, the optimizer and sampling filters.

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>

#include "rlhf/core/error.h"
#include "rlhf/kernels/adamw.h"
#include "rlhf/ppo/aggregation.h"
#include "rlhf/ppo/token_distribution.h"
#include "rlhf/train/lr_schedule.h"
#include "rlhf/verify/golden_case.h"
#include "rlhf/verify/trl_options.h"
#include "rollout/sampling/filter.h"

namespace rlhf::verify {
namespace {

struct Distributions {
  std::vector<double> log_probs, entropies, squares, d_log_probs, d_entropies;
};

// Gradients of the row's log-prob and entropy are appended to `all`.
template <class T>
void add_row(std::span<const double> logits, std::size_t label, double temperature, Distributions& all) {
  const std::vector<T> row(logits.begin(), logits.end());
  const ppo::TokenDistribution d = ppo::token_distribution<T>(row, label, temperature);
  all.log_probs.push_back(d.log_prob);
  all.entropies.push_back(d.entropy);
  all.squares.push_back(d.sum_pi_squared);
  std::vector<T> log_prob_gradient(row.size());
  std::vector<T> entropy_gradient(row.size());
  ppo::add_distribution_gradient<T>(row, label, temperature, {1, 0}, log_prob_gradient);
  ppo::add_distribution_gradient<T>(row, label, temperature, {0, 1}, entropy_gradient);
  all.d_log_probs.insert(all.d_log_probs.end(), log_prob_gradient.begin(), log_prob_gradient.end());
  all.d_entropies.insert(all.d_entropies.end(), entropy_gradient.begin(), entropy_gradient.end());
}

}  // namespace

void check_logprob_entropy(GoldenCase& golden, const nlohmann::json&) {
  const Tensor logits = golden.input("logits");
  const std::vector<double> labels = golden.values("labels");
  const double temperature = golden.number("temperature");
  const std::size_t vocabulary = logits.shape.back();
  Distributions all;
  for (std::size_t i = 0; i < labels.size(); ++i) {
    const auto row = std::span(logits.values).subspan(i * vocabulary, vocabulary);
    const auto label = static_cast<std::size_t>(labels[i]);
    if (golden.is_float32()) {
      add_row<float>(row, label, temperature, all);
    } else {
      add_row<double>(row, label, temperature, all);
    }
  }
  golden.check("logprob_verl", all.log_probs);
  golden.check("logprob_openrlhf", all.log_probs,
               golden.has_output("logprob_openrlhf") ? golden.at_least(1e-6) : golden.tolerance());
  golden.check("dlogprob_dlogits", all.d_log_probs);
  golden.check("entropy", all.entropies);
  golden.check("dentropy_dlogits", all.d_entropies);
  golden.check("sum_pi_squared", all.squares);
  const MatrixRows rows = matrix_rows(golden.input("mask"));
  golden.check("entropy_loss_token_mean",
               ppo::weighted_sum(ppo::aggregation_weights({}, rows.view()), all.entropies));
}

void check_lr_schedule(GoldenCase& golden, const nlohmann::json&) {
  const std::string schedule = golden.text("schedule");
  const double base = golden.number("base_lr");
  LrScheduleOptions options = lr_schedule_named(schedule);
  options.warmup_steps = static_cast<std::size_t>(golden.number("num_warmup_steps", 0));
  if (schedule == "constant") options.warmup_steps = 0;
  options.min_ratio = golden.number("min_lr_rate", golden.number("min_lr_ratio", 0));
  if (golden.has_param("min_lr")) options.min_ratio = golden.number("min_lr") / base;
  if (golden.has_param("lr_end")) options.min_ratio = golden.number("lr_end") / base;
  options.start_ratio = golden.number("init_lr_ratio", 0);
  // transformers starts this warmup at the minimum, verl at zero.
  if (schedule == "warmup_stable_decay") options.start_ratio = options.min_ratio;
  options.cycles = golden.number("num_cycles", options.cycles);
  options.power = golden.number("power", 1);
  options.decay_steps = static_cast<std::size_t>(golden.number("num_decay_steps", 0));
  options.stable_ratio = golden.number("stable_ratio", 0.9);
  const auto total = static_cast<std::size_t>(golden.number("num_training_steps"));
  const std::size_t steps = golden.output("lr").size();
  std::vector<double> rates;
  for (std::size_t step = 0; step < steps; ++step)
    rates.push_back(base * learning_rate_factor(options, step, total));
  golden.check("lr", rates, {1e-10, 0});
}

namespace {

template <class T>
struct OptimizedTensor {
  std::vector<T> parameters, first, second, largest;
};

template <class T>
void run_optimizer(GoldenCase& golden) {
  AdamwStep step;
  step.learning_rate = golden.number("lr");
  const Tensor betas = read_tensor(golden.param("betas"));
  step.beta1 = betas.values.at(0);
  step.beta2 = betas.values.at(1);
  step.epsilon = golden.number("eps");
  step.weight_decay = golden.number("weight_decay");
  const double max_norm = golden.number("max_grad_norm", 0);
  const bool amsgrad = golden.flag("amsgrad");
  std::vector<OptimizedTensor<T>> tensors;
  for (const auto& json : golden.raw_input("params")) {
    const Tensor start = read_tensor(json);
    OptimizedTensor<T> tensor;
    tensor.parameters.assign(start.values.begin(), start.values.end());
    tensor.first.resize(start.values.size());
    tensor.second.resize(start.values.size());
    if (amsgrad) tensor.largest.resize(start.values.size());
    tensors.push_back(std::move(tensor));
  }
  std::vector<double> norms;
  std::vector<double> trajectory;
  for (const auto& step_gradients : golden.raw_input("grads")) {
    std::vector<std::vector<T>> gradients;
    double squares = 0;
    for (const auto& json : step_gradients) {
      const Tensor g = read_tensor(json);
      gradients.emplace_back(g.values.begin(), g.values.end());
      const std::vector<T>& values = gradients.back();
      squares += kernels::kernels_for<T>(kernels::detect_cpu_isa())
                     .sum_squares(values.data(), static_cast<std::int64_t>(values.size()));
    }
    norms.push_back(std::sqrt(squares));
    step.gradient_scale = clip_scale(norms.back(), max_norm);
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      OptimizedTensor<T>& t = tensors[i];
      adamw_update<T>(step, {t.parameters, gradients.at(i), t.first, t.second, t.largest});
      trajectory.insert(trajectory.end(), t.parameters.begin(), t.parameters.end());
    }
    ++step.step;
  }
  std::vector<double> expected;
  for (const auto& after : golden.output("params_after_each_step")) {
    for (const auto& json : after) {
      const Tensor t = read_tensor(json);
      expected.insert(expected.end(), t.values.begin(), t.values.end());
    }
  }
  golden.compare("params_after_each_step", trajectory, expected, golden.tolerance());
  golden.check("grad_norm", norms);
  const nlohmann::json& states = golden.output("final_state");
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    for (const auto& [key, json] : states.at(i).items()) {
      const std::vector<T>* actual = key == "exp_avg"          ? &tensors[i].first
                                     : key == "exp_avg_sq"     ? &tensors[i].second
                                     : key == "max_exp_avg_sq" ? &tensors[i].largest
                                                               : nullptr;
      if (key == "step") continue;
      if (actual == nullptr) {
        golden.fail_with("output 'final_state." + key + "' is not known");
        continue;
      }
      golden.compare(concat("final_state[", i, "].", key),
                     std::vector<double>(actual->begin(), actual->end()), read_tensor(json).values,
                     golden.tolerance());
    }
  }
}

}  // namespace

void check_optimizer(GoldenCase& golden, const nlohmann::json& source) {
  RLHF_CHECK(package_of(source) == "torch", "package '", package_of(source), "' is not known");
  if (golden.is_float32()) {
    run_optimizer<float>(golden);
  } else {
    run_optimizer<double>(golden);
  }
}

namespace {

SamplingOptions read_sampling(GoldenCase& golden) {
  SamplingOptions options;
  options.temperature = golden.number("temperature", 1.0);
  options.top_k = static_cast<std::size_t>(golden.number("top_k", 0));
  options.top_p = golden.number("top_p", 1.0);
  options.min_p = golden.optional_number("min_p");
  options.repetition_penalty = golden.number("penalty", golden.number("repetition_penalty", 1.0));
  options.min_tokens_to_keep = static_cast<std::size_t>(golden.number("min_tokens_to_keep", 1));
  if (golden.has_param("filter_value")) {
    RLHF_CHECK(golden.number("filter_value") == -std::numeric_limits<double>::infinity(), "filter_value ",
               golden.number("filter_value"), " is not known, expected -inf");
  }
  static const std::vector<std::string> kOrder = {"RepetitionPenaltyLogitsProcessor",
                                                  "TemperatureLogitsWarper", "TopKLogitsWarper",
                                                  "TopPLogitsWarper", "MinPLogitsWarper"};
  std::size_t stage = 0;
  for (const auto& name : golden.param("processors_in_order")) {
    const auto it =
        std::find(kOrder.begin() + static_cast<std::ptrdiff_t>(stage), kOrder.end(), name.get<std::string>());
    RLHF_CHECK(it != kOrder.end(), "processor ", name.dump(), " is not known at this place of the order");
    stage = static_cast<std::size_t>(it - kOrder.begin()) + 1;
  }
  return options;
}

}  // namespace

void check_sampling(GoldenCase& golden, const nlohmann::json&) {
  const SamplingOptions options = read_sampling(golden);
  const std::vector<double> raw = golden.values("logits");
  std::vector<float> logits(raw.begin(), raw.end());
  std::vector<TokenId> previous;
  for (const double token : golden.optional_values("previous_tokens").value_or(std::vector<double>{})) {
    previous.push_back(static_cast<TokenId>(token));
  }
  apply_penalties(options, {previous, previous}, logits);
  apply_temperature(options, logits);
  std::vector<double> kept(logits.size(), 0.0);
  std::vector<double> filtered(logits.size(), -std::numeric_limits<double>::infinity());
  std::vector<double> probabilities(logits.size(), 0.0);
  const std::vector<KeptToken> tokens = filter_tokens(options, logits);
  double largest = -std::numeric_limits<double>::infinity();
  double mass = 0;
  for (const KeptToken& t : tokens) largest = std::max(largest, static_cast<double>(t.logit));
  for (const KeptToken& t : tokens) mass += std::exp(t.logit - largest);
  for (const KeptToken& t : tokens) {
    const auto i = static_cast<std::size_t>(t.token);
    kept[i] = 1;
    filtered[i] = t.logit;
    probabilities[i] = std::exp(t.logit - largest) / mass;
  }
  const bool tie = golden.output("boundary_tie").get<double>() != 0;
  golden.check("num_kept", static_cast<double>(tokens.size()));
  if (!tie) {
    golden.check("kept", kept);
    golden.check("filtered_logits", filtered);
    golden.check("probabilities", probabilities);
    return;
  }
  // Which of the tied tokens stay is the sort's choice; the probabilities as a set are not.
  golden.output("kept");
  golden.output("filtered_logits");
  std::vector<double> expected = read_tensor(golden.output("probabilities")).values;
  std::sort(expected.begin(), expected.end());
  std::sort(probabilities.begin(), probabilities.end());
  golden.compare("sorted probabilities", probabilities, expected, golden.tolerance());
}

}  // namespace rlhf::verify

#pragma once
// A small model and the tools that hold a stage's gradient to central differences in double.

#include <algorithm>
#include <cmath>
#include <vector>

#include "rlhf/core/random.h"
#include "rlhf/model/sequence_pass.h"
#include "rlhf/train/language_model.h"
#include "rlhf/train/optimizer.h"
#include "tests/catch.h"
#include "tests/train/tiny_run.h"

namespace rlhf {

inline NewModelOptions tiny_model() {
  NewModelOptions options;
  options.layers = 2;
  options.hidden_size = 16;
  options.heads = 2;
  options.kv_heads = 1;
  options.intermediate_size = 24;
  options.max_positions = 64;
  options.initial_std = 0.15;
  return options;
}

inline std::vector<TokenId> random_tokens(std::size_t count, std::uint64_t stream) {
  RandomStream random(99, stream);
  std::vector<TokenId> tokens(count);
  for (TokenId& token : tokens) token = static_cast<TokenId>(random.below(256));
  return tokens;
}

struct Lane {
  ThreadPool pool{1};
  Watcher watcher{nullptr};
  StageContext context{Compute<float>(pool, kernels::detect_cpu_isa())};
  Lane() {
    context.observer = &watcher;
    context.seed = 5;
  }
};

// The same weights in double.
inline Parameters<double> to_double(const Parameters<float>& from, const TrainableOptions& trainable) {
  Parameters<double> to(from.config(), trainable, nullptr);
  for (std::size_t i = 0; i < to.entries().size(); ++i) {
    const auto& source = from.entries()[i];
    REQUIRE(source.spec.name == to.entries()[i].spec.name);
    std::copy_n(source.value, source.spec.num_elements(), to.entries()[i].value);
  }
  return to;
}

inline std::vector<double> double_logprobs(const Parameters<double>& parameters,
                                           const std::vector<TokenId>& tokens) {
  ThreadPool pool(1);
  SequencePass<double> pass(parameters.config(), Compute<double>(pool, kernels::CpuIsa::kBaseline));
  const PackedRows rows({tokens});
  pass.forward(parameters.weights(), rows, SequencePass<double>::Keep::kNothing);
  std::vector<TokenTarget> targets;
  for (std::size_t t = 1; t < tokens.size(); ++t)
    targets.push_back({static_cast<std::int64_t>(t) - 1, tokens[t]});
  std::vector<double> logprobs(targets.size());
  pass.token_logprobs(parameters.weights(), targets, 1, logprobs, {});
  return logprobs;
}

inline double double_score(const Parameters<double>& parameters, const std::vector<TokenId>& tokens) {
  ThreadPool pool(1);
  SequencePass<double> pass(parameters.config(), Compute<double>(pool, kernels::CpuIsa::kBaseline));
  const PackedRows rows({tokens});
  pass.forward(parameters.weights(), rows, SequencePass<double>::Keep::kNothing);
  const std::vector<std::int64_t> last = {static_cast<std::int64_t>(tokens.size()) - 1};
  std::vector<double> value(1);
  pass.scalar_outputs(parameters.weights(), last, value);
  return value[0];
}

// With epsilon far above the gradient, AdamW's first step is -learning_rate / epsilon times the gradient: the
// step shows the gradient that the stage has computed.
inline OptimizerOptions gradient_step() {
  OptimizerOptions options;
  options.learning_rate = 1e4;
  options.epsilon = 1e4;
  options.max_grad_norm = 0;
  options.schedule.shape = LrShape::kConstant;
  return options;
}

// Compares weights_before - weights_after with central differences of `loss` over some of the trained weights
// of every tensor.
template <class Loss>
void check_gradient(const std::vector<float>& before, const Parameters<float>& after,
                    Parameters<double>& in_double, const Loss& loss) {
  const auto trained = after.trainable();
  const auto doubles = in_double.trainable();
  REQUIRE(trained.size() == doubles.size());
  std::size_t tested = 0, nonzero = 0;
  for (const auto& entry : in_double.entries()) {
    if (entry.gradient == nullptr) continue;
    const auto first = static_cast<std::size_t>(entry.value - doubles.data());
    const auto count = static_cast<std::size_t>(entry.spec.num_elements());
    RandomStream random(1, first);
    for (int pick = 0; pick < 6; ++pick) {
      const std::size_t at = first + random.below(count);
      double& weight = doubles[at];
      const double value = weight, step = 1e-5;
      weight = value + step;
      const double above = loss();
      weight = value - step;
      const double below = loss();
      weight = value;
      const double slope = (above - below) / (2 * step);
      const double gradient = static_cast<double>(before[at]) - static_cast<double>(trained[at]);
      INFO(entry.spec.name << " element " << at - first);
      // The difference of two floats near 1 is good to 6e-8, the forward pass in float to about 1e-5.
      CHECK(gradient == Approx(slope).margin(2e-6).epsilon(3e-3));
      ++tested;
      nonzero += std::abs(slope) > 1e-4;
    }
  }
  CHECK(tested > 50);
  CHECK(nonzero > tested / 3);
}

}  // namespace rlhf

// The training pass over packed sequences against a decoder written with ATen's operators and differentiated
// by autograd, both in double and in float. The same decoder is the peer of the benchmarks.

#include <ATen/ops/log_softmax.h>
#include <ATen/ops/tensor.h>

#include <map>

#include "benchmarks/eager_llama.h"
#include "rlhf/model/parameters.h"
#include "rlhf/model/sequence_pass.h"
#include "tests/torch/tensors.h"

namespace rlhf::torch_test {
namespace {

ModelConfig make_config(bool tied) {
  ModelConfig config;
  config.architecture = Architecture::kLlama;
  config.vocab_size = 97;
  config.hidden_size = 48;
  config.intermediate_size = 80;
  config.num_layers = 3;
  config.num_heads = 6;
  config.num_kv_heads = 2;
  config.head_dim = 8;
  config.max_positions = 64;
  config.norm_eps = 1e-5;
  config.layer_uses_rope.assign(3, 1);
  config.layer_window.assign(3, 0);
  config.attention_scale = 1 / std::sqrt(8.0);
  config.tied_embeddings = tied;
  validate_model_config(config, "the test's configuration");
  return config;
}

std::vector<TokenId> random_tokens(std::int64_t count, std::int64_t vocab_size, unsigned seed) {
  std::mt19937 engine(seed);
  std::vector<TokenId> tokens;
  for (std::int64_t i = 0; i < count; ++i)
    tokens.push_back(static_cast<TokenId>(engine() % static_cast<unsigned>(vocab_size)));
  return tokens;
}

at::Tensor ids(const std::vector<TokenId>& tokens) {
  std::vector<std::int64_t> wide(tokens.begin(), tokens.end());
  return at::tensor(wide, at::kLong).unsqueeze(0);
}

// An eager model with the weights of `parameters`, in double.
template <class T>
eager::Llama eager_copy(const Parameters<T>& parameters) {
  eager::Llama model(parameters.config(), at::kDouble);
  for (const auto& [name, weight] : model.parameters()) {
    const auto* entry = parameters.find(name);
    REQUIRE(entry != nullptr);
    weight.copy_(tensor(entry->value, weight.sizes()));
  }
  return model;
}

template <class T>
void check_against_autograd(bool tied, double tolerance) {
  const ModelConfig config = make_config(tied);
  Parameters<T> parameters(config, {}, nullptr);
  parameters.initialise(7, 0.2);
  parameters.zero_gradient();
  const double temperature = 0.8;

  // Two sequences share a head that is laid out once; one is alone.
  std::vector<std::vector<TokenId>> sequences = {random_tokens(40, 97, 1), random_tokens(9, 97, 2)};
  sequences.push_back(sequences[0]);
  sequences[2].resize(35);
  sequences[2].insert(sequences[2].end(), {5, 6, 7});
  const PackedRows rows({sequences.begin(), sequences.end()});
  std::vector<TokenTarget> targets;
  std::vector<T> dlogprobs, dentropies;
  for (std::size_t s = 0; s < sequences.size(); ++s)
    for (std::size_t t = 3; t < sequences[s].size(); ++t) {
      targets.push_back({rows.row(s, static_cast<std::int64_t>(t) - 1), sequences[s][t]});
      dlogprobs.push_back(static_cast<T>(std::sin(static_cast<double>(targets.size()))));
      dentropies.push_back(static_cast<T>(0.3 * std::cos(static_cast<double>(targets.size()))));
    }

  ThreadPool pool(2);
  const Compute<T> compute(pool, kernels::detect_cpu_isa());
  SequencePass<T> pass(config, compute);
  std::vector<T> logprobs(targets.size()), entropies(targets.size());
  pass.forward(parameters.weights(), rows, SequencePass<T>::Keep::kForBackward);
  pass.token_logprobs(parameters.weights(), targets, temperature, logprobs, entropies);
  pass.token_logprobs_backward(parameters.weights(), targets, temperature, dlogprobs, dentropies);
  pass.backward(parameters.weights(), rows);

  eager::Llama model = eager_copy(parameters);
  for (const auto& [name, weight] : model.parameters()) weight.requires_grad_();
  std::size_t next = 0;
  for (const auto& sequence : sequences) {
    const auto log_probs =
        at::log_softmax(model.logits(model.forward(ids(sequence), nullptr)).squeeze(0) / temperature, -1);
    const auto entropy = -(log_probs.exp() * log_probs).sum(-1);
    at::Tensor loss = log_probs.sum() * 0;
    for (std::size_t t = 3; t < sequence.size(); ++t, ++next) {
      const auto row = static_cast<std::int64_t>(t) - 1;
      const auto log_prob = log_probs[row][sequence[t]];
      CHECK(std::abs(static_cast<double>(logprobs[next]) - log_prob.item<double>()) < 10 * tolerance);
      CHECK(std::abs(static_cast<double>(entropies[next]) - entropy[row].item<double>()) < 10 * tolerance);
      loss = loss + log_prob * static_cast<double>(dlogprobs[next]) +
             entropy[row] * static_cast<double>(dentropies[next]);
    }
    loss.backward();
  }
  for (const auto& [name, weight] : model.parameters()) {
    INFO(name);
    CHECK(difference(parameters.find(name)->gradient, weight.grad()) < tolerance);
  }
}

TEST_CASE("the training pass in double agrees with autograd") {
  check_against_autograd<double>(true, 1e-11);
  check_against_autograd<double>(false, 1e-11);
}

// Three layers of float sums, each rounded to 6e-8 of its largest terms.
TEST_CASE("the training pass in float agrees with autograd") {
  check_against_autograd<float>(true, 1e-4);
  check_against_autograd<float>(false, 1e-4);
}

TEST_CASE("the benchmarks' peer decodes with a cache as it does without") {
  const ModelConfig config = make_config(true);
  const eager::Llama model(config, at::kDouble);
  const auto tokens = random_tokens(20, config.vocab_size, 3);
  const auto all = ids(tokens);
  const auto expected = model.forward(all, nullptr);
  auto cache = model.make_cache(1, 20);
  CHECK(difference(model.forward(all.narrow(1, 0, 12), &cache).contiguous().const_data_ptr<double>(),
                   expected.narrow(1, 0, 12)) < 1e-12);
  for (std::int64_t t = 12; t < 20; ++t)
    CHECK(difference(model.forward(all.narrow(1, t, 1), &cache).contiguous().const_data_ptr<double>(),
                     expected.narrow(1, t, 1)) < 1e-12);
}

}  // namespace
}  // namespace rlhf::torch_test

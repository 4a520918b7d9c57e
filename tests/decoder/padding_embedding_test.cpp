// The embedding of a configuration's padding token, as torch's Embedding treats padding_idx. The recorded
// GRPO and RLOO runs, in which the padding token is sampled, are the other test of it.
#include <algorithm>
#include <cmath>
#include <filesystem>

#include "rlhf/model/parameters.h"
#include "rlhf/model/sequence_pass.h"
#include "rlhf/model/weight_file.h"
#include "tests/catch.h"

using namespace rlhf;

namespace {

const std::filesystem::path kGolden = std::filesystem::path(RLHF_SOURCE_DIR) / "tests" / "golden";

// Largest gradient of each token's embedding after a loss over a sequence that holds tokens 0 to 3.
std::vector<double> embedding_gradients(const std::string& model, const std::string& tensor) {
  const std::filesystem::path folder = kGolden / model;
  ThreadPool pool(1);
  const Compute<double> compute(pool, kernels::detect_cpu_isa());
  Parameters<double> parameters(load_model_config(folder), {}, nullptr);
  parameters.load(*WeightFile::open(folder));
  SequencePass<double> pass(parameters.config(), compute);
  const std::vector<TokenId> tokens = {1, 0, 2, 0, 3};
  const PackedRows rows({tokens});
  const std::vector<TokenTarget> targets = {{3, 5}, {4, 6}};
  std::vector<double> log_probs(2);
  pass.forward(parameters.weights(), rows, SequencePass<double>::Keep::kForBackward);
  pass.token_logprobs(parameters.weights(), targets, 1, log_probs, {});
  pass.token_logprobs_backward(parameters.weights(), targets, 1, std::vector<double>{1, 1}, {});
  pass.backward(parameters.weights(), rows);
  const auto* entry = parameters.find(tensor);
  REQUIRE(entry);
  std::vector<double> largest(4);
  const std::int64_t width = entry->spec.shape[1];
  for (std::int64_t i = 0; i < 4 * width; ++i) {
    double& value = largest[static_cast<std::size_t>(i / width)];
    value = std::max(value, std::abs(entry->gradient[i]));
  }
  return largest;
}

}  // namespace

TEST_CASE("the padding token's embedding takes no gradient from the input") {
  const auto gradients = embedding_gradients("model_llama_gqa_untied", "model.embed_tokens.weight");
  CHECK(gradients[0] == 0);
  CHECK(*std::min_element(gradients.begin() + 1, gradients.end()) > 0);
}

TEST_CASE("GPT-2 has no padding row") {
  CHECK(load_model_config(kGolden / "model_llama_gqa_untied").fixed_embedding == 0);
  CHECK(load_model_config(kGolden / "model_gpt2").pad == 0);
  CHECK_FALSE(load_model_config(kGolden / "model_gpt2").fixed_embedding);
}

// Gradients in slices against whole ones of the same model, which are added up here.
#include "rlhf/model/sliced_gradient.h"

#include "rlhf/core/random.h"
#include "rlhf/model/sequence_pass.h"
#include "rlhf/train/language_model.h"
#include "rlhf/train/optimizer.h"
#include "tests/catch.h"
#include "tests/distributed/exchanged.h"
#include "tests/distributed/silent_rank.h"
#include "tests/distributed/thread_ranks.h"

using namespace rlhf;

namespace {

constexpr std::int64_t kD = 16, kF = 24;  // widths of the model and its MLP

ModelConfig small_config(bool is_tied, bool is_scalar = false) {
  NewModelOptions options;
  options.layers = 3;
  options.hidden_size = kD;
  options.heads = 2;
  options.kv_heads = 1;
  options.intermediate_size = kF;
  options.max_positions = 64;
  ModelConfig config = LanguageModel::create(options, {}, 1).config();
  config.tied_embeddings = is_tied;
  config.scalar_head = is_scalar;
  config.num_labels = is_scalar ? 1 : 0;
  return config;
}

// q, k, v and what comes out of attention, the two norms, gate, up and down.
constexpr std::size_t kLayerElements = (kD + 2 * 8) * kD + kD * kD + 2 * kD + 3 * kD * kF;

struct Model {
  std::string name;
  ModelConfig config;
  TrainableOptions trainable = {};
};

std::vector<Model> models() {
  TrainableOptions last, lora;
  last.mode = TrainableMode::kLastLayers;
  last.last_layers = 2;
  lora.mode = TrainableMode::kLora;
  lora.lora_rank = 2;
  lora.lora_targets = {"q_proj", "down_proj"};
  return {{"tied", small_config(true)},
          {"untied", small_config(false)},
          {"score head, last layers", small_config(true, true), last},
          {"adapters", small_config(true), lora},
          {"adapters and score head", small_config(true, true), lora}};
}

// Random, adapters too: B is zero in a new model, and then A learns nothing.
Parameters<float> make_parameters(const Model& model) {
  Parameters<float> parameters(model.config, model.trainable, nullptr);
  parameters.initialise(7, 0.2);
  RandomStream random(8, 0);
  for (float& value : parameters.trainable()) value += static_cast<float>(0.1 * random.normal());
  return parameters;
}

// One sequence for every pass of a rank: rank 0 has most, the last one none.
std::size_t num_passes(int rank, int ranks) {
  return rank == ranks - 1 ? 0 : rank == 0 ? 3 : 1;
}
constexpr std::size_t kMostPasses = 3;

std::vector<TokenId> tokens_of(int rank, std::size_t pass) {
  RandomStream random(9, 10 * static_cast<std::uint64_t>(rank) + pass);
  std::vector<TokenId> tokens(17 + 5 * pass);
  for (TokenId& token : tokens) token = static_cast<TokenId>(random.below(256));
  return tokens;
}

void add_gradient(SequencePass<float>& pass, const Parameters<float>& parameters,
                  const std::vector<TokenId>& tokens) {
  const PackedRows rows({tokens});
  const DecoderWeights<float>& weights = parameters.weights();
  pass.forward(weights, rows, PassKeep::kForBackward);
  if (parameters.config().scalar_head) {
    const std::vector<std::int64_t> last = {rows.last_row(0)};
    pass.scalar_outputs_backward(weights, last, std::vector<float>{1.5f});
  } else {
    std::vector<TokenTarget> targets;
    for (std::size_t t = 0; t + 1 < tokens.size(); ++t)
      targets.push_back({rows.row(0, static_cast<std::int64_t>(t)), tokens[t + 1]});
    std::vector<float> log_probs(targets.size());
    pass.token_logprobs(weights, targets, 1, log_probs, {});
    pass.token_logprobs_backward(weights, targets, 1, std::vector<float>(targets.size(), -0.1f), {});
  }
  pass.backward(weights, rows);
}

// What all ranks' passes add up to: pass by pass, and within one in the order of the ranks.
std::vector<float> expected_gradient(const Model& model, int ranks) {
  ThreadPool pool(1);
  SequencePass<float> pass(model.config, Compute<float>(pool, kernels::detect_cpu_isa()));
  Parameters<float> parameters = make_parameters(model);
  std::vector<float> total(parameters.num_trainable());
  for (std::size_t p = 0; p < kMostPasses; ++p) {
    std::vector<float> sum(total.size());
    for (int rank = 0; rank < ranks; ++rank) {
      if (p >= num_passes(rank, ranks)) continue;
      parameters.zero_gradient();
      add_gradient(pass, parameters, tokens_of(rank, p));
      for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += parameters.gradient()[i];
    }
    for (std::size_t i = 0; i < sum.size(); ++i) total[i] += sum[i];
  }
  return total;
}

}  // namespace

TEST_CASE("a rank's slice of a gradient is that of the whole one, added in the order of ranks and passes") {
  for (const Model& model : models())
    for (const int ranks : {2, 4})
      for (const Recompute recompute : {Recompute::kNone, Recompute::kLayers}) {
        INFO(model.name << " on " << ranks);
        const std::vector<float> expected = expected_gradient(model, ranks);
        REQUIRE(std::ranges::count(expected, 0.0f) < std::ssize(expected) / 2);
        std::vector<std::vector<float>> slices(static_cast<std::size_t>(ranks)), again = slices;
        ThreadRanks(ranks).run([&](Collective& collective) {
          ThreadPool pool(1);
          SequencePass<float> pass(model.config, Compute<float>(pool, kernels::detect_cpu_isa()), recompute);
          Parameters<float> parameters = make_parameters(model);
          parameters.slice_gradient(collective);
          const int rank = collective.rank();
          const auto take = [&] {
            for (std::size_t p = 0; p < kMostPasses; ++p)
              if (p < num_passes(rank, ranks))
                add_gradient(pass, parameters, tokens_of(rank, p));
              else
                pass.skip_backward(parameters.weights());
            const auto values = parameters.sliced_gradient()->values();
            return std::vector<float>(values.begin(), values.end());
          };
          slices[static_cast<std::size_t>(rank)] = take();
          parameters.zero_gradient();
          again[static_cast<std::size_t>(rank)] = take();
        });
        std::vector<float> all;
        for (int rank = 0; rank < ranks; ++rank) {
          const auto& slice = slices[static_cast<std::size_t>(rank)];
          CHECK(slice.size() ==
                begin_of(expected.size(), rank + 1, ranks) - begin_of(expected.size(), rank, ranks));
          CHECK((slice == again[static_cast<std::size_t>(rank)]));
          all.insert(all.end(), slice.begin(), slice.end());
        }
        CHECK((all == expected));
      }
}

TEST_CASE("a rank holds its slice, the largest layer and what is in no layer") {
  SilentRank rank(1, 4);
  for (const bool is_tied : {true, false}) {
    Parameters<float> parameters = make_parameters({"", small_config(is_tied)});
    const auto vocabulary = static_cast<std::size_t>(parameters.config().vocab_size);
    const std::size_t rest = (is_tied ? 1 : 2) * vocabulary * kD + kD, all = 3 * kLayerElements + rest;
    REQUIRE(parameters.num_trainable() == all);
    CHECK(parameters.gradient_bytes() == sizeof(float) * all);
    parameters.slice_gradient(rank);
    const std::size_t slice = begin_of(all, 2, 4) - begin_of(all, 1, 4);
    CHECK(parameters.gradient_bytes() == sizeof(float) * (slice + kLayerElements + rest));
    CHECK(parameters.gradient().empty());
  }
}

TEST_CASE("models made from one with a sliced gradient have theirs in slices, if they learn") {
  SilentRank rank(0, 2);
  Parameters<float> policy = make_parameters({"", small_config(true)});
  policy.slice_gradient(rank);
  const Parameters<float> critic(small_config(true, true), {}, &policy);
  REQUIRE(critic.sliced_gradient());
  CHECK(critic.weights().gradient_sink == critic.sliced_gradient());
  CHECK(critic.sliced_gradient()->place().end == begin_of(critic.num_trainable(), 1, 2));
  const Parameters<float> reference = policy.frozen_copy(), snapshot = policy.snapshot();
  for (const Parameters<float>* model : {&reference, &snapshot}) {
    CHECK_FALSE(model->sliced_gradient());
    CHECK_FALSE(model->weights().gradient_sink);
    CHECK(model->gradient_bytes() == 0);
  }
  // One rank has the whole gradient.
  Parameters<float> alone = make_parameters({"", small_config(true)});
  alone.slice_gradient(one_process());
  CHECK_FALSE(alone.sliced_gradient());
}

TEST_CASE("an optimizer and a gradient of other slices are refused") {
  SilentRank gradient_rank(0, 2), optimizer_rank(1, 2);
  Parameters<float> parameters = make_parameters({"", small_config(true)});
  parameters.slice_gradient(gradient_rank);
  Optimizer<float> optimizer({}, parameters.num_trainable(), optimizer_rank);
  ThreadPool pool(1);
  CHECK_THROWS_WITH(
      optimizer.step(Compute<float>(pool, kernels::detect_cpu_isa()), parameters, 0.1),
      ContainsSubstring("Optimizer: updates elements") && ContainsSubstring("the gradient's slice is 0 to"));
}

// An engine on an accelerator whose K and V are kept in fp8.
#include <cmath>

#include "rlhf/model/decoder.h"
#include "tests/device/device_setup.h"

using namespace rlhf;

namespace {

// Log-probs of all tokens after `tokens` by one pass in float on the CPU, with K and V in fp8.
std::vector<double> fp8_logprobs(const LanguageModel& model, const std::vector<TokenId>& tokens,
                                 double temperature) {
  const ModelConfig& config = model.config();
  const DecoderWeights<float>& weights = model.parameters().weights();
  const PackedRows packed({tokens});
  const std::size_t slab = KvStore<float>::block_bytes(config, config.num_layers, KvFormat::kFp8);
  Arena arena;
  arena.open(to_size(packed.num_blocks()) * slab, slab);
  REQUIRE(arena.try_set_slabs(packed.num_blocks()));
  ThreadPool pool(1);
  const Compute<float> compute(pool, kernels::detect_cpu_isa());
  KvStore<float> store(config, config.num_layers, arena, nullptr, KvFormat::kFp8);
  DecoderRunner<float> runner(config, compute);
  const std::int64_t rows = packed.rows().size(), D = config.hidden_size, V = config.vocab_size;
  std::vector<float> x(to_size(rows * D)), logits(to_size(V));
  runner.embed(weights, packed.rows(), x.data());
  runner.forward_layers(weights, packed.rows(), 0, config.num_layers, store, 0, x.data(), nullptr);
  float* const last = x.data() + (rows - 1) * D;
  runner.final_norm(weights, 1, last, last, nullptr, nullptr);
  runner.linear(weights.head, 1, last, logits.data(), false);
  double total = 0;
  std::vector<double> out;
  for (const float logit : logits) {
    out.push_back(static_cast<double>(logit) / temperature);
    total += std::exp(out.back());
  }
  for (double& value : out) value -= std::log(total);
  return out;
}

}  // namespace

TEST_CASE("an engine with K and V in fp8 draws from the model's distribution over rounded K and V",
          "[device]") {
  Setup host;
  on_every_accelerator([&](const Accelerator& accelerator) {
    INFO(accelerator.name);
    DeviceSetup setup(accelerator);
    const auto requests = few_requests();
    const auto draw = [&](KvFormat kv) {
      RolloutEngineOptions options;
      options.max_sequences = 7;
      options.max_tokens_per_step = 48;
      options.kv = kv;
      return run(*setup.engine(options), setup.model, requests);
    };
    // Mean distance of what was recorded to the model's own log-probs, and to those over rounded K and V.
    struct Distances {
      double exact = 0, rounded = 0;
      double compared = 0;
    };
    const auto distances = [&](const std::map<Key, Sample>& samples) {
      Distances sums;
      for (const auto& [key, sample] : samples) {
        const GenerationRequest& request = requests[key.first];
        if (!is_plain(request) || key.second > 0) continue;
        const double temperature = is_greedy(request.sampling) ? 1 : request.sampling.temperature;
        std::vector<TokenId> tokens = request.prompt;
        for (std::size_t t = 0; t < sample.tokens.size(); ++t, ++sums.compared) {
          const auto chosen = to_size(sample.tokens[t]);
          const double got = static_cast<double>(sample.logprobs[t]);
          sums.exact += std::abs(got - static_cast<double>(host.next_logprobs(tokens, temperature)[chosen]));
          sums.rounded += std::abs(got - fp8_logprobs(host.model, tokens, temperature)[chosen]);
          tokens.push_back(sample.tokens[t]);
        }
      }
      REQUIRE(sums.compared > 20);
      return Distances{sums.exact / sums.compared, sums.rounded / sums.compared, sums.compared};
    };
    const Distances fp8 = distances(draw(KvFormat::kFp8)), bf16 = distances(draw(KvFormat::kAuto));
    INFO("fp8: " << fp8.exact << " to the model, " << fp8.rounded
                 << " to the rounded one; bf16: " << bf16.exact << " and " << bf16.rounded);
    // Rounding moves a number by 2^-9 of it at most in bfloat16 and by 2^-4 in fp8; some dozen of the former
    // meet in a log-prob, and two of the latter in each layer. They show, and stay of that order.
    CHECK(fp8.exact > 2 * bf16.exact);
    CHECK(fp8.exact < 0.15);
    // Where bfloat16 moves a number over the middle between two codes, the two differ by a whole step, so the
    // engine is not much nearer to the rounded model; but it is nearer, and bfloat16 is not.
    CHECK(fp8.rounded < 0.8 * fp8.exact);
    CHECK(bf16.rounded > bf16.exact);
  });
}

TEST_CASE("blocks in fp8 take half of those in bfloat16, and their scales", "[device]") {
  on_every_accelerator([&](const Accelerator& accelerator) {
    INFO(accelerator.name);
    DeviceSetup setup(accelerator);
    const ModelConfig& config = setup.model.config();
    REQUIRE(config.num_layers == 2);
    REQUIRE(config.num_kv_heads == 2);
    REQUIRE(config.head_dim == 6);
    const auto slab = [&](KvFormat kv) { return RolloutEngine::slab_bytes(config, setup.compute(), 0, kv); };
    // K and V of 16 tokens, 2 layers and 2 heads: 6 elements each, and a scale.
    CHECK(slab(KvFormat::kAuto) == 2 * 16 * 2 * 2 * 6 * 2);
    CHECK(slab(KvFormat::kFp8) == 2 * 16 * 2 * 2 * (6 + 1));
    RolloutEngineOptions options;
    options.kv = KvFormat::kFp8;
    options.num_blocks = 10;
    CHECK(setup.engine(options)->kv_bytes() == 10 * slab(KvFormat::kFp8));
  });
}

TEST_CASE("K and V in fp8 are refused where the engine runs on the CPU") {
  Setup host;
  RolloutEngineOptions options;
  options.kv = KvFormat::kFp8;
  CHECK_THROWS_WITH(host.engine(options), ContainsSubstring("K and V in fp8 are for a GPU"));
}

TEST_CASE("tiles of rows read K and V in fp8 that rows by themselves wrote, and the other way round",
          "[device]") {
  on_every_accelerator([&](const Accelerator& accelerator) {
    INFO(accelerator.name);
    NewModelOptions shape;  // with a head width that tensor cores take
    shape.layers = 1;       // and slabs that are rounded up
    shape.hidden_size = 64;
    shape.heads = 2;
    shape.kv_heads = 1;
    shape.intermediate_size = 32;
    shape.max_positions = 96;
    shape.initial_std = 0.25;
    DeviceSetup setup(accelerator, LanguageModel::create(shape, {.mode = TrainableMode::kNone}, 4));
    RolloutEngineOptions whole, pieces;
    whole.kv = pieces.kv = KvFormat::kFp8;
    pieces.max_tokens_per_step = 12;  // too few for a tile
    const std::vector<GenerationRequest> requests = {greedy(make_request(1, 50, 30))};
    const auto expected = run(*setup.engine(whole), setup.model, requests);
    const auto got = run(*setup.engine(pieces), setup.model, requests);
    for (const auto& [key, sample] : expected) {
      REQUIRE(sample.tokens.size() == 30);
      CHECK(got.at(key).tokens == sample.tokens);
      for (std::size_t t = 0; t < sample.tokens.size(); ++t)
        CHECK(std::abs(got.at(key).logprobs[t] - sample.logprobs[t]) < 0.06F);
    }
  });
}

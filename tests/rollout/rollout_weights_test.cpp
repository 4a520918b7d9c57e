// Generation with weights in bf16 and int8: the engine against full forward passes over the same weights,
// bf16 against fp32 weights that were rounded, and both against the weights they stand for.
#include "rlhf/model/rollout_weights.h"

#include <cmath>

#include "rlhf/kernels/bfloat16.h"
#include "tests/rollout/support.h"

using namespace rlhf;

namespace {

struct Packed {
  Setup setup;
  Compute<float> compute{setup.pool, kernels::detect_cpu_isa()};
  const DecoderWeights<float>& source = setup.model.parameters().weights();

  RolloutWeights pack(WeightFormat format) { return RolloutWeights(format, source, source, compute); }

  std::map<Key, Sample> run(const RolloutEngineOptions& options, const DecoderWeights<float>& weights,
                            const std::vector<GenerationRequest>& requests) {
    const auto engine = setup.engine(options);
    std::map<Key, Sample> samples;
    for (const GenerationRequest& request : requests) engine->submit(request);
    for (int steps = 0; engine->busy(); ++steps) {
      REQUIRE(steps < 5000);
      engine->step(weights, 0);
      while (auto sample = engine->try_take())
        samples.emplace(Key{sample->prompt_id, sample->sample_index}, std::move(*sample));
    }
    return samples;
  }
  // Log-probs of each token of `response` behind `prompt`, by one forward pass without cache.
  std::vector<float> logprobs(const DecoderWeights<float>& weights, const std::vector<TokenId>& prompt,
                              const std::vector<TokenId>& response) {
    std::vector<TokenId> tokens = prompt;
    tokens.insert(tokens.end(), response.begin(), response.end());
    SequencePass<float> pass(setup.model.config(), compute);
    const PackedRows rows({tokens});
    pass.forward(weights, rows, SequencePass<float>::Keep::kNothing);
    std::vector<TokenTarget> targets;
    for (std::size_t t = 0; t < response.size(); ++t)
      targets.push_back({static_cast<std::int64_t>(prompt.size() + t) - 1, response[t]});
    std::vector<float> out(targets.size());
    pass.token_logprobs(weights, targets, 1, out, {});
    return out;
  }
  TokenId most_likely(const DecoderWeights<float>& weights, const std::vector<TokenId>& prompt) {
    std::vector<float> all;
    SequencePass<float> pass(setup.model.config(), compute);
    const PackedRows rows({prompt});
    pass.forward(weights, rows, SequencePass<float>::Keep::kNothing);
    std::vector<TokenTarget> targets;
    for (TokenId token = 0; token < setup.model.config().vocab_size; ++token)
      targets.push_back({static_cast<std::int64_t>(prompt.size()) - 1, token});
    all.resize(targets.size());
    pass.token_logprobs(weights, targets, 1, all, {});
    return static_cast<TokenId>(std::ranges::max_element(all) - all.begin());
  }
};

// fp32 weights with every projection and the head rounded to bf16.
struct Rounded {
  DecoderWeights<float> weights;
  std::vector<std::vector<float>> storage;

  explicit Rounded(const DecoderWeights<float>& source) : weights(source) {
    for (auto& layer : weights.layers)
      for (auto* w : {&layer.qkv, &layer.out, &layer.gate_up, &layer.down}) round(*w);
    round(weights.head);
  }
  void round(LinearWeights<float>& w) {
    std::vector<float>& values = storage.emplace_back();
    for (std::int64_t i = 0; i < w.N * w.K; ++i)
      values.push_back(to_float(from_float<Bfloat16>(w.weight[i])));
    w.weight = values.data();  // which stays where it is when `storage` grows
  }
};

void check_equal(const std::map<Key, Sample>& a, const std::map<Key, Sample>& b) {
  REQUIRE(a.size() == b.size());
  for (const auto& [key, sample] : a) rlhf::check_equal(sample, b.at(key));
}

constexpr WeightFormat kFormats[] = {WeightFormat::kBf16, WeightFormat::kInt8};

}  // namespace

TEST_CASE("greedy tokens and log-probs are those of full forward passes over the packed weights") {
  Packed packed;
  for (const WeightFormat format : kFormats) {
    const RolloutWeights weights = packed.pack(format);
    std::vector<GenerationRequest> requests;
    for (PromptId id = 0; id < 6; ++id) {
      requests.push_back(make_request(id, 2 + 9 * id, 12));
      if (id % 2) requests.back() = greedy(requests.back());
    }
    RolloutEngineOptions options;
    options.max_tokens_per_step = 20;
    for (const auto& [key, sample] : packed.run(options, weights.weights(), requests)) {
      const GenerationRequest& request = requests[key.first];
      INFO(to_string(format) << ", prompt " << key.first);
      CHECK(sample.logprobs == packed.logprobs(weights.weights(), request.prompt, sample.tokens));
      if (request.sampling.temperature > 0) continue;
      std::vector<TokenId> tokens = request.prompt;
      for (TokenId token : sample.tokens) {
        CHECK(token == packed.most_likely(weights.weights(), tokens));
        tokens.push_back(token);
      }
    }
  }
}

TEST_CASE("samples do not depend on batch, chunks, preemption or guesses, with packed weights as with fp32") {
  Packed packed;
  const auto requests = mixed_requests();
  for (const WeightFormat format : kFormats) {
    const RolloutWeights weights = packed.pack(format);
    RolloutEngineOptions alone;
    alone.max_sequences = 1;
    alone.max_tokens_per_step = 1;
    const auto expected = packed.run(alone, weights.weights(), requests);
    struct Case {
      std::int64_t max_sequences, max_tokens_per_step, num_blocks, max_draft_rows;
    };
    for (const Case& c : {Case{5, 64, 12, 0}, Case{40, 512, 300, 0}, Case{3, 33, 64, 12}}) {
      RolloutEngineOptions options;
      options.max_sequences = c.max_sequences;
      options.max_tokens_per_step = c.max_tokens_per_step;
      options.num_blocks = c.num_blocks;
      options.max_draft_rows = c.max_draft_rows;
      INFO(to_string(format) << ", max_sequences " << c.max_sequences);
      check_equal(packed.run(options, weights.weights(), requests), expected);
    }
  }
}

TEST_CASE("bf16 samples are those of fp32 weights that were rounded, bit for bit") {
  Packed packed;
  const Rounded rounded(packed.source);
  const auto requests = mixed_requests();
  const auto bf16 = packed.run({}, packed.pack(WeightFormat::kBf16).weights(), requests);
  check_equal(bf16, packed.run({}, rounded.weights, requests));
  const auto fp32 = packed.run({}, packed.source, requests);
  bool differs = false;
  for (const auto& [key, sample] : bf16) differs |= sample.logprobs != fp32.at(key).logprobs;
  CHECK(differs);
}

TEST_CASE("log-probs under packed weights stay close to those under fp32") {
  Packed packed;
  // A relative step of 2^-9 (bf16) or of 1/254 of the largest weight and activation (int8) on logits of a few
  // nats: hundredths. A matrix that is left out, or the head's scales mixed up, gives whole nats.
  for (const auto& [format, mean_bound] :
       {std::pair{WeightFormat::kBf16, 0.02}, std::pair{WeightFormat::kInt8, 0.1}}) {
    const RolloutWeights weights = packed.pack(format);
    double sum = 0, count = 0, largest = 0;
    for (PromptId id = 0; id < 20; ++id) {
      const auto request = make_request(id, 10, 30);
      const auto response = make_request(100 + id, 30, 1).prompt;
      const auto exact = packed.logprobs(packed.source, request.prompt, response);
      const auto rounded = packed.logprobs(weights.weights(), request.prompt, response);
      for (std::size_t t = 0; t < exact.size(); ++t) {
        const double gap = std::abs(static_cast<double>(exact[t]) - static_cast<double>(rounded[t]));
        sum += gap;
        largest = std::max(largest, gap);
        ++count;
      }
    }
    INFO(to_string(format) << ": mean gap " << sum / count << ", largest " << largest);
    CHECK(sum / count > 0);
    CHECK(sum / count < mean_bound);
    CHECK(largest < 10 * mean_bound);
  }
}

TEST_CASE("refresh packs what learns, from a copy as well") {
  ThreadPool pool(1);
  const Compute<float> compute(pool, kernels::detect_cpu_isa());
  for (const TrainableMode mode : {TrainableMode::kAll, TrainableMode::kLastLayers, TrainableMode::kLora}) {
    TrainableOptions trainable;
    trainable.mode = mode;
    trainable.last_layers = 1;
    NewModelOptions shape;
    shape.layers = 2;
    shape.hidden_size = 24;
    shape.heads = 4;
    shape.kv_heads = 2;
    shape.intermediate_size = 32;
    shape.initial_std = 0.25;
    LanguageModel model = LanguageModel::create(shape, trainable, 4);
    Parameters<float>& policy = model.parameters();
    Parameters<float> snapshot = policy.snapshot();
    const std::vector<TokenId> tokens = {1, 5, 9, 200, 3};
    const auto forward = [&](const DecoderWeights<float>& weights) {
      SequencePass<float> pass(model.config(), compute);
      const PackedRows rows({tokens});
      pass.forward(weights, rows, SequencePass<float>::Keep::kNothing);
      const std::vector<TokenTarget> targets = {{4, 17}, {2, 0}, {1, 255}};
      std::vector<float> out(targets.size());
      pass.token_logprobs(weights, targets, 1, out, {});
      return out;
    };
    for (const WeightFormat format : kFormats) {
      RolloutWeights weights(format, snapshot.weights(), policy.weights(), compute);
      CHECK(weights.bytes() == RolloutWeights::bytes(format, model.config()));
      const auto before = forward(weights.weights());
      CHECK(before == forward(RolloutWeights(format, policy.weights(), policy.weights(), compute).weights()));
      for (float& value : policy.trainable()) value = 0.7F * value + 0.01F;
      CHECK(forward(weights.weights()) == before);  // nothing is published yet
      std::ranges::copy(policy.trainable(), snapshot.trainable().begin());
      weights.refresh(compute);
      INFO(to_string(format) << ", mode " << static_cast<int>(mode));
      CHECK(forward(weights.weights()) ==
            forward(RolloutWeights(format, policy.weights(), policy.weights(), compute).weights()));
      CHECK(forward(weights.weights()) != before);
    }
  }
}

TEST_CASE("rollout weights refuse fp32 and models that generate nothing") {
  Packed packed;
  CHECK_THROWS_WITH(packed.pack(WeightFormat::kFp32), ContainsSubstring("fp32 is not packed"));
  DecoderWeights<float> scalar = packed.source;
  scalar.config.scalar_head = true;
  CHECK_THROWS_WITH(RolloutWeights(WeightFormat::kInt8, scalar, scalar, packed.compute),
                    ContainsSubstring("scalar head"));
  CHECK(RolloutWeights::bytes(WeightFormat::kFp32, packed.setup.model.config()) == 0);
}

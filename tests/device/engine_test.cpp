// The rollout engine on an accelerator against full passes in float on the CPU, and against itself.
#include <cmath>

#include "tests/device/device_setup.h"

using namespace rlhf;

namespace {

// Bfloat16 has 8 bits; logits of this model are of order 1, and some dozen roundings meet in each.
constexpr float kTolerance = 0.06F;

// Counts the recordings made and their replays.
class CountingQueue : public LooseQueue {
 public:
  using LooseQueue::LooseQueue;
  std::unique_ptr<Recording> record(const std::function<void()>& work) override {
    ++recorded;
    return std::make_unique<Counted>(*this, LooseQueue::record(work));
  }
  int recorded = 0, replayed = 0;

 private:
  struct Counted : Recording {
    Counted(CountingQueue& queue, std::unique_ptr<Recording> recording)
        : queue_(queue), recording_(std::move(recording)) {}
    void replay() override {
      ++queue_.replayed;
      recording_->replay();
    }
    CountingQueue& queue_;
    std::unique_ptr<Recording> recording_;
  };
};

}  // namespace

TEST_CASE("an engine on an accelerator draws from the model's distribution and records it", "[device]") {
  Setup host;
  on_every_accelerator([&](const Accelerator& accelerator) {
    INFO(accelerator.name);
    DeviceSetup setup(accelerator);
    RolloutEngineOptions options;
    options.max_sequences = 7;
    options.max_tokens_per_step = 48;
    const auto requests = few_requests();
    const auto samples = run(*setup.engine(options), setup.model, requests);
    std::size_t compared = 0;
    for (const auto& [key, sample] : samples) {
      const GenerationRequest& request = requests[key.first];
      INFO("prompt " << key.first << ", sample " << key.second);
      REQUIRE_FALSE(sample.tokens.empty());
      CHECK(sample.tokens.size() <= static_cast<std::size_t>(request.stop.max_new_tokens));
      if (!is_plain(request) || key.second > 0) continue;
      const bool takes_best = is_greedy(request.sampling);
      std::vector<TokenId> tokens = request.prompt;
      for (std::size_t t = 0; t < sample.tokens.size(); ++t) {
        const auto expected = host.next_logprobs(tokens, takes_best ? 1 : request.sampling.temperature);
        const auto chosen = static_cast<std::size_t>(sample.tokens[t]);
        CHECK(std::abs(sample.logprobs[t] - expected[chosen]) < kTolerance);
        if (takes_best) CHECK(expected[chosen] > *std::ranges::max_element(expected) - kTolerance);
        tokens.push_back(sample.tokens[t]);
        ++compared;
      }
    }
    CHECK(compared > 20);
  });
}

// Runs the requests on the accelerator and, with the same logits, on the host.
// @return the sum of what changing the rows did to the drawn tokens' log-probs
double compare_with_host(DeviceSetup& setup, std::vector<GenerationRequest> requests) {
  RolloutEngineOptions options;
  options.max_sequences = 8;
  for (GenerationRequest& request : requests) request.output = {.raw_logprobs = true, .entropies = true};
  const auto on_device = run(*setup.engine(options), setup.model, requests);
  for (GenerationRequest& request : requests) request.output.top_logprobs = 1;  // needs the row on the host
  const auto on_host = run(*setup.engine(options), setup.model, requests);
  REQUIRE(on_device.size() == on_host.size());
  double changed = 0;
  for (const auto& [key, sample] : on_host) {
    INFO("prompt " << key.first << ", sample " << key.second);
    const Sample& got = on_device.at(key);
    REQUIRE(got.tokens == sample.tokens);
    REQUIRE(got.logprobs.size() == sample.logprobs.size());
    REQUIRE(got.raw_logprobs.size() == got.logprobs.size());
    REQUIRE(got.entropies.size() == got.logprobs.size());
    for (std::size_t t = 0; t < got.logprobs.size(); ++t) {
      CHECK(std::abs(got.logprobs[t] - sample.logprobs[t]) < 1e-5F);
      CHECK(std::abs(got.raw_logprobs[t] - sample.raw_logprobs[t]) < 1e-5F);
      CHECK(std::abs(got.entropies[t] - sample.entropies[t]) < 1e-5F);
      changed += std::abs(got.logprobs[t] - got.raw_logprobs[t]);
    }
  }
  return changed;
}

TEST_CASE("filters on an accelerator draw what the host draws from the same logits", "[device]") {
  on_every_accelerator([&](const Accelerator& accelerator) {
    INFO(accelerator.name);
    DeviceSetup setup(accelerator);
    std::vector<GenerationRequest> requests;
    for (PromptId id = 0; id < 6; ++id) {
      auto request = make_request(id, 3 + 2 * id, 6);
      request.num_samples = 2;
      request.sampling.temperature = id % 2 == 0 ? 1 : 0.7;
      if (id < 3) request.sampling.top_k = 9;
      if (id % 3 != 0) request.sampling.top_p = 0.6;
      if (id > 3) request.sampling.min_p = 0.2;
      requests.push_back(request);
    }
    CHECK(compare_with_host(setup, requests) > 1);
  });
}

TEST_CASE("penalties, biases and constraints on an accelerator draw what the host draws from the same logits",
          "[device]") {
  on_every_accelerator([&](const Accelerator& accelerator) {
    INFO(accelerator.name);
    DeviceSetup setup(accelerator);
    std::vector<GenerationRequest> requests;
    for (PromptId id = 0; id < 9; ++id) {
      auto request = make_request(id, 3 + 2 * id, 9);
      request.num_samples = 2;
      request.sampling.temperature = id % 3 == 2 ? 0 : id % 2 == 0 ? 1 : 0.7;
      request.stop.tokens = {5, 77, 130};
      if (id == 1 || id == 2) request.sampling.repetition_penalty = 1.8;
      if (id == 3 || id == 5) {
        request.sampling.presence_penalty = 1.5;
        request.sampling.frequency_penalty = 0.8;
      }
      if (id == 4 || id == 8) request.constraint.allowed_tokens = {200, 5, 17, 9, 17, 30, 31, 32, 4};
      if (id == 5) request.constraint.choices = {{7, 8, 9}, {7, 8, 30, 31}, {40}, {7, 8}};
      if (id > 5) request.constraint.logit_bias = {{9, 6.0F}, {5, 5.0F}, {250, -30.0F}};
      if (id > 6) request.stop.min_new_tokens = 4;
      if (id == 4 || id == 6) request.sampling.top_k = 5;
      if (id == 3) request.sampling.top_p = 0.7;
      requests.push_back(request);
    }
    CHECK(compare_with_host(setup, requests) > 10);
  });
}

TEST_CASE("steps whose edits grow with the response go on with their recording", "[device]") {
  if (!wants_device("emulated")) return;
  CountingQueue memory(std::make_shared<GuardedSpace>(std::size_t{1} << 30));
  const Accelerator accelerator = emulated_accelerator(memory);
  DeviceSetup setup(accelerator);
  std::vector<GenerationRequest> requests = {make_request(1, 12, 40)};
  requests[0].sampling.repetition_penalty = 1.3;
  const auto samples = run(*setup.engine({}), setup.model, requests);
  REQUIRE(samples.at({1, 0}).tokens.size() == 40);
  // 39 steps decode. Lists outgrow their place twice at most, and a place is recorded when it is seen again.
  CHECK(memory.recorded <= 3);
  CHECK(memory.replayed >= 30);
}

TEST_CASE("on an accelerator a sample depends neither on its neighbours nor on the cache's size",
          "[device]") {
  on_every_accelerator([&](const Accelerator& accelerator) {
    INFO(accelerator.name);
    DeviceSetup setup(accelerator);
    const auto requests = few_requests();
    for (const KvFormat kv : {KvFormat::kAuto, KvFormat::kFp8}) {
      INFO("K and V " << to_string(kv));
      RolloutEngineOptions together, alone, tight;
      together.max_sequences = 16;
      alone.max_sequences = 1;
      alone.max_tokens_per_step = 16;
      tight.max_sequences = 16;
      tight.num_blocks = 12;  // preempts
      together.kv = alone.kv = tight.kv = kv;
      const auto expected = run(*setup.engine(together), setup.model, requests);
      for (const RolloutEngineOptions& other : {alone, tight}) {
        const auto got = run(*setup.engine(other), setup.model, requests);
        REQUIRE(got.size() == expected.size());
        for (const auto& [key, sample] : expected) check_equal(got.at(key), sample);
      }
    }
  });
}

TEST_CASE("an accelerator's cache gives blocks back between steps and goes on from what has moved",
          "[device]") {
  on_every_accelerator([&](const Accelerator& accelerator) {
    INFO(accelerator.name);
    DeviceSetup setup(accelerator);
    const auto requests = few_requests();
    for (const KvFormat kv : {KvFormat::kAuto, KvFormat::kFp8}) {
      INFO("K and V " << to_string(kv));
      RolloutEngineOptions options;
      options.max_sequences = 6;
      options.num_blocks = 40;
      options.kv = kv;
      const auto expected = run(*setup.engine(options), setup.model, requests);
      Arena arena;
      const std::size_t slab = RolloutEngine::slab_bytes(setup.model.config(), setup.compute(), 0, kv);
      arena.open(41 * slab, slab, accelerator.memory);
      options.arena = &arena;
      const auto engine = setup.engine(options);
      std::map<Key, Sample> samples;
      for (const GenerationRequest& request : requests) engine->submit(request);
      for (int step = 0; engine->busy(); ++step) {
        REQUIRE(step < 2000);
        engine->set_block_limit(step % 3 == 0 ? 14 : 40);
        if (step % 3 == 0) {  // somebody else writes where blocks were
          Buffer<std::byte> other((40 - 14) * slab, &arena);
          accelerator.memory->zero(other.data(), other.size());
        }
        engine->step(setup.model.parameters().weights(), 0);
        while (auto sample = engine->try_take()) {
          const Key key{sample->prompt_id, sample->sample_index};
          samples.emplace(key, std::move(*sample));
        }
      }
      REQUIRE(samples.size() == expected.size());
      for (const auto& [key, sample] : expected) check_equal(samples.at(key), sample);
    }
  });
}

TEST_CASE("guesses do not change what an accelerator draws, also where they are a tile of rows", "[device]") {
  on_every_accelerator([&](const Accelerator& accelerator) {
    INFO(accelerator.name);
    NewModelOptions options;  // with a head width that tensor cores take
    options.layers = 1;
    options.hidden_size = 64;
    options.heads = 2;
    options.kv_heads = 1;
    options.intermediate_size = 32;
    options.max_positions = 96;
    options.initial_std = 0.25;
    DeviceSetup setup(accelerator, LanguageModel::create(options, {.mode = TrainableMode::kNone}, 4));
    RolloutEngineOptions plain, guessing;
    guessing.max_draft_rows = 40;
    guessing.draft_row_cost = 0;
    const std::vector<GenerationRequest> requests = {greedy(make_request(1, 6, 86))};
    const auto expected = run(*setup.engine(plain), setup.model, requests);
    const auto engine = setup.engine(guessing);
    run(*engine, setup.model, requests);  // it has seen the text then
    const auto learned = engine->statistics();
    const auto got = run(*engine, setup.model, requests);
    CHECK(engine->statistics().accepted_drafts - learned.accepted_drafts > 30);
    CHECK(engine->statistics().steps - learned.steps < 35);
    // Rows in a tile round elsewhere than rows by themselves.
    for (const auto& [key, sample] : expected) CHECK(got.at(key).tokens == sample.tokens);
  });
}

TEST_CASE("logits that are not finite on an accelerator name prompt and layer", "[device]") {
  on_every_accelerator([&](const Accelerator& accelerator) {
    INFO(accelerator.name);
    DeviceSetup setup(accelerator);
    LanguageModel broken = make_model();
    for (auto& entry : broken.parameters().entries())
      if (entry.spec.layer == 1 && entry.spec.role == TensorRole::kDown) entry.value[0] = std::nanf("");
    broken.parameters().place_on(accelerator);
    for (const KvFormat kv : {KvFormat::kAuto, KvFormat::kFp8}) {
      RolloutEngineOptions options;
      options.kv = kv;
      const auto engine = setup.engine(options);
      engine->submit(make_request(3, 5, 4));
      CHECK_THROWS_WITH(engine->step(broken.parameters().weights(), 0),
                        ContainsSubstring("prompt 3") && ContainsSubstring("layer 2 of 2"));
    }
  });
}

TEST_CASE("an engine on an accelerator needs a model that is there", "[device]") {
  on_every_accelerator([&](const Accelerator& accelerator) {
    DeviceSetup setup(accelerator);
    const LanguageModel elsewhere = make_model();
    const auto engine = setup.engine({});
    engine->submit(make_request(3, 5, 4));
    CHECK_THROWS_WITH(engine->step(elsewhere.parameters().weights(), 0), ContainsSubstring("place_on"));
  });
}

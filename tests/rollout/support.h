#pragma once
// A tiny model, an engine for it, and runs to the end.

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "rlhf/core/random.h"
#include "rlhf/model/sequence_pass.h"
#include "rlhf/train/language_model.h"
#include "rollout/engine/rollout_engine.h"
#include "tests/catch.h"

namespace rlhf {

/// Answers at once, inside the response, whenever a turn contains `trigger`.
class InlineHandler : public TurnHandler {
 public:
  using Respond = std::function<std::vector<TokenId>(std::string_view turn)>;
  InlineHandler(std::string trigger, Respond respond)
      : strings_{std::move(trigger)}, respond_(std::move(respond)) {}

  const std::vector<std::string>& strings() const override { return strings_; }
  bool takes_stops() const override { return false; }
  std::optional<TurnReply> respond(const FinishedTurn& turn, const std::shared_ptr<TurnMailbox>&) override {
    TurnReply reply;
    reply.tokens = respond_(turn.text);
    reply.opens_turn = false;
    return reply;
  }
  bool overdue(TurnTicket, double) const override { return false; }
  void ended(TurnTicket) override {}

 private:
  std::vector<std::string> strings_;
  Respond respond_;
};

inline LanguageModel make_model(std::uint64_t seed = 4) {
  NewModelOptions options;
  options.layers = 2;
  options.hidden_size = 24;
  options.heads = 4;
  options.kv_heads = 2;
  options.intermediate_size = 32;
  options.max_positions = 96;
  options.initial_std = 0.25;
  TrainableOptions frozen;
  frozen.mode = TrainableMode::kNone;
  return LanguageModel::create(options, frozen, seed);
}

struct Setup {
  LanguageModel model = make_model();
  ThreadPool pool{1};

  std::unique_ptr<RolloutEngine> engine(RolloutEngineOptions options) {
    if (options.num_blocks == 0) options.num_blocks = 64;
    return std::make_unique<RolloutEngine>(model.config(), Compute<float>(pool, kernels::detect_cpu_isa()),
                                           options,
                                           [this](TokenId id) { return model.tokenizer().token_bytes(id); });
  }
  // Log-probs of all tokens after `tokens`, by a full forward pass without cache.
  std::vector<float> next_logprobs(const std::vector<TokenId>& tokens, double temperature = 1) {
    SequencePass<float> pass(model.config(), Compute<float>(pool, kernels::detect_cpu_isa()));
    const PackedRows rows({tokens});
    pass.forward(model.parameters().weights(), rows, SequencePass<float>::Keep::kNothing);
    std::vector<TokenTarget> targets;
    for (TokenId token = 0; token < model.config().vocab_size; ++token)
      targets.push_back({static_cast<std::int64_t>(tokens.size()) - 1, token});
    std::vector<float> logprobs(targets.size());
    pass.token_logprobs(model.parameters().weights(), targets, temperature, logprobs, {});
    return logprobs;
  }
  std::vector<TokenId> greedy_continuation(std::vector<TokenId> tokens, std::size_t count) {
    const std::size_t begin = tokens.size();
    for (std::size_t i = 0; i < count; ++i) {
      const auto logprobs = next_logprobs(tokens);
      tokens.push_back(static_cast<TokenId>(std::ranges::max_element(logprobs) - logprobs.begin()));
    }
    return {tokens.begin() + static_cast<std::ptrdiff_t>(begin), tokens.end()};
  }
};

inline GenerationRequest make_request(PromptId id, std::size_t prompt_tokens, std::int64_t max_new_tokens) {
  GenerationRequest request;
  request.prompt_id = id;
  RandomStream random(11, id);
  for (std::size_t i = 0; i < prompt_tokens; ++i)
    request.prompt.push_back(static_cast<TokenId>(random.below(256)));
  request.stop.max_new_tokens = max_new_tokens;
  request.seed = 42;
  return request;
}

inline GenerationRequest greedy(GenerationRequest request) {
  request.sampling.temperature = 0;
  return request;
}

using Key = std::pair<PromptId, std::uint32_t>;

inline std::map<Key, Sample> run(RolloutEngine& engine, const LanguageModel& model,
                                 const std::vector<GenerationRequest>& requests, WeightVersion version = 0) {
  std::map<Key, Sample> samples;
  for (const GenerationRequest& request : requests) engine.submit(request);
  for (int steps = 0; engine.busy(); ++steps) {
    REQUIRE(steps < 5000);
    engine.step(model.parameters().weights(), version);
    engine.cache().check();
    while (auto sample = engine.try_take()) {
      const Key key{sample->prompt_id, sample->sample_index};
      REQUIRE(samples.emplace(key, std::move(*sample)).second);
    }
  }
  return samples;
}

inline void check_equal(const Sample& a, const Sample& b) {
  INFO("prompt " << a.prompt_id << ", sample " << a.sample_index);
  CHECK(a.tokens == b.tokens);
  CHECK(a.logprobs == b.logprobs);
  CHECK(a.mask == b.mask);
  CHECK(a.finish_reason == b.finish_reason);
}

// Requests of many shapes: short and long prompts, shared beginnings, several samples, all kinds of sampling.
inline std::vector<GenerationRequest> mixed_requests() {
  std::vector<GenerationRequest> requests;
  const auto shared = make_request(100, 40, 1).prompt;
  for (PromptId id = 0; id < 14; ++id) {
    auto request = make_request(id, 1 + (id * 7) % 37, 3 + static_cast<std::int64_t>(id * 5 % 19));
    if (id % 3 == 0) request.prompt.insert(request.prompt.begin(), shared.begin(), shared.end());
    request.num_samples = 1 + static_cast<std::uint32_t>(id % 4);
    request.stop.tokens = {5, 77, 130};
    if (id % 4 == 1) request.sampling.temperature = 0;
    if (id % 4 == 2) request.sampling.top_p = 0.8;
    if (id % 4 == 3) {
      request.sampling.repetition_penalty = 1.2;
      request.sampling.temperature = 0.7;
      request.stop.min_new_tokens = 3;
    }
    requests.push_back(std::move(request));
  }
  return requests;
}

}  // namespace rlhf

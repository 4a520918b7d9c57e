#include "rlhf/train/generation.h"

#include <algorithm>
#include <map>
#include <span>

#include "rlhf/core/error.h"
#include "rlhf/distributed/balance.h"
#include "rlhf/train/rank_exchange.h"

namespace rlhf {

std::string RolloutOptions::rounding_text() const {
  if (weights == WeightFormat::kFp32) return concat("rollout.kv_dtype is ", to_string(kv_dtype));
  return concat("rollout.weights is ", to_string(weights));
}

GenerationRequest make_request(const Prompt& prompt, const RolloutOptions& rollout,
                               const LanguageModel& model, const TaskData& data) {
  GenerationRequest request;
  request.prompt_id = prompt.id;
  request.prompt = prompt.tokens;
  request.sampling = rollout.sampling;
  request.stop.tokens = model.end_tokens();
  request.stop.strings = rollout.stop_strings;
  request.stop.max_new_tokens = rollout.max_new_tokens;
  if (const EpisodeRunner* episodes = data.environment(prompt.task))
    request.turns = episodes->handler(prompt);
  return request;
}

BlockNeed block_need(const RolloutOptions& rollout, std::int64_t longest_prompt) {
  const std::int64_t tokens = longest_prompt + rollout.max_new_tokens;
  return {RolloutEngine::blocks_for(1, tokens), RolloutEngine::blocks_for(rollout.max_sequences + 1, tokens)};
}

std::int64_t longest_prompt(const std::vector<Prompt>& prompts) {
  std::size_t longest = 1;
  for (const Prompt& prompt : prompts) longest = std::max(longest, prompt.tokens.size());
  return static_cast<std::int64_t>(longest);
}

std::unique_ptr<RolloutEngine> make_engine(const LanguageModel& model, const EngineSetting& setting) {
  const RolloutOptions& rollout = setting.rollout;
  const BlockNeed need = block_need(rollout, longest_prompt(setting.prompts));
  std::int64_t max_blocks = setting.max_blocks;
  if (setting.kv != rollout.kv_dtype && max_blocks < std::numeric_limits<std::int64_t>::max()) {
    const auto bytes = [&](KvFormat kv) {
      return static_cast<std::int64_t>(
          RolloutEngine::slab_bytes(model.config(), setting.compute, setting.trunk_layers, kv));
    };
    max_blocks = max_blocks * bytes(rollout.kv_dtype) / bytes(setting.kv);
  }
  if (max_blocks < need.minimum)
    fail<MemoryError>("rollout: the memory budget leaves ", max_blocks,
                      " K/V blocks, the longest prompt "
                      "and response need ",
                      need.minimum);
  RolloutEngineOptions options;
  options.max_sequences = rollout.max_sequences;
  options.max_tokens_per_step = rollout.max_tokens_per_step;
  options.max_draft_rows = rollout.draft_rows;
  options.trunk_layers = setting.trunk_layers;
  options.decoding = rollout.decoding;
  options.arena = setting.arena;
  options.kv = setting.kv;
  options.num_blocks = std::min(need.wanted, max_blocks);
  std::function<std::string(TokenId)> token_bytes;
  if (model.has_tokenizer())
    token_bytes = [tokenizer = model.tokenizer()](TokenId id) { return tokenizer.token_bytes(id); };
  return std::make_unique<RolloutEngine>(model.config(), setting.compute, options, std::move(token_bytes));
}

std::vector<Sample> generate_all(RolloutEngine& engine, const DecoderWeights<float>& weights,
                                 WeightVersion version, std::vector<GenerationRequest> requests) {
  std::map<PromptId, std::size_t> order;
  for (GenerationRequest& request : requests) {
    order.emplace(request.prompt_id, order.size());
    engine.submit(std::move(request));
  }
  std::vector<Sample> samples;
  while (engine.busy()) {
    engine.step(weights, version);
    while (auto sample = engine.try_take()) samples.push_back(std::move(*sample));
  }
  std::ranges::sort(samples, {},
                    [&](const Sample& s) { return std::pair(order.at(s.prompt_id), s.sample_index); });
  return samples;
}

std::vector<Sample> generate_all(Collective& collective, RolloutEngine& engine,
                                 const DecoderWeights<float>& weights, WeightVersion version,
                                 std::vector<GenerationRequest> requests) {
  std::map<PromptId, std::size_t> order;
  std::vector<double> costs;
  for (const GenerationRequest& request : requests) {
    order.emplace(request.prompt_id, order.size());
    costs.push_back(static_cast<double>(request.prompt.size()) +
                    static_cast<double>(request.num_samples) *
                        static_cast<double>(request.stop.max_new_tokens));
  }
  const std::vector<int> ranks = balanced_shares(costs, collective.world_size());
  std::vector<GenerationRequest> own;
  for (std::size_t i = 0; i < requests.size(); ++i)
    if (ranks[i] == collective.rank()) own.push_back(std::move(requests[i]));
  std::vector<Sample> samples =
      gather_samples(collective, generate_all(engine, weights, version, std::move(own)));
  std::ranges::sort(samples, {},
                    [&](const Sample& s) { return std::pair(order.at(s.prompt_id), s.sample_index); });
  return samples;
}

std::string response_text(const LanguageModel& model, const Sample& sample) {
  return model.tokenizer().decode(std::span(sample.tokens).subspan(sample.answer_begin),
                                  {.skip_special = true});
}

std::string episode_text(const LanguageModel& model, const Sample& sample) {
  return model.tokenizer().decode(sample.tokens);
}

}  // namespace rlhf

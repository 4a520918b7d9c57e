#include "rollout/engine/rollout_engine.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "rlhf/core/error.h"
#include "rlhf/core/random.h"
#include "rollout/sampling/sampler.h"

namespace rlhf {
namespace {

bool needs_history(const SamplingOptions& sampling) {
  return sampling.repetition_penalty != 1 || sampling.presence_penalty != 0 ||
         sampling.frequency_penalty != 0;
}

constexpr std::int64_t kB = kernels::kBlockTokens;
// Rows whose logits exist at once. 64 rows of a 49152-word vocabulary are 12 MiB; the head's weights (113 MB
// there) are read once for all of them.
constexpr std::int64_t kLogitsRows = 64;

std::int64_t blocks_of(std::int64_t tokens) {
  return (tokens + kB - 1) / kB;
}
std::size_t size(std::int64_t n) {
  return static_cast<std::size_t>(n);
}

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

// All samples of one request. The prompt up to its last token is prefilled once into `table`; every sample
// shares its full blocks and starts by feeding the last prompt token, so the first logits need no copy.
struct RolloutEngine::Group {
  GenerationRequest request;
  std::vector<std::int32_t> table;
  std::int64_t prefilled = 0;  // tokens of the prompt whose K/V exist
  std::uint32_t started = 0, alive = 0;

  std::int64_t prefix_tokens() const { return static_cast<std::int64_t>(request.prompt.size()) - 1; }
  bool ready() const { return prefilled >= prefix_tokens(); }
  std::int64_t blocks_per_sample() const {
    return blocks_of(static_cast<std::int64_t>(request.prompt.size()) + request.stop.max_new_tokens) -
           prefix_tokens() / kB;
  }
};

struct RolloutEngine::Sequence {
  Group* group = nullptr;
  Sample sample;
  std::vector<std::int32_t> table;
  std::vector<TokenId> pending;  // tokens to feed in the next step; the last one's logits are sampled
  std::int64_t position = 0;     // tokens whose K/V exist
  std::string text;              // response text, kept only when stop strings or a tool need it
  std::size_t tool_search_from = 0;
  int tool_calls = 0;
  std::vector<TokenId> history;  // prompt and response, kept only when penalties need it
  bool done = false;
};

RolloutEngine::RolloutEngine(const ModelConfig& config, Compute<float> compute,
                             const RolloutEngineOptions& options,
                             std::function<std::string(TokenId)> token_bytes)
    : config_(config),
      options_(options),
      runner_(config, compute),
      store_(config, config.num_layers, options.num_blocks),
      cache_(static_cast<std::int32_t>(options.num_blocks), static_cast<std::int32_t>(kB)),
      token_bytes_(std::move(token_bytes)) {
  RLHF_CHECK(options.max_sequences > 0 && options.max_tokens_per_step > 0 && options.num_blocks > 0,
             "RolloutEngine: max_sequences, max_tokens_per_step and num_blocks must be positive");
}

RolloutEngine::~RolloutEngine() = default;

std::int64_t RolloutEngine::blocks_for(std::int64_t num_sequences, std::int64_t max_tokens) {
  return num_sequences * (blocks_of(max_tokens) + 1);
}

void RolloutEngine::submit(GenerationRequest request) {
  const auto where = [&] { return concat("generation request for prompt ", request.prompt_id); };
  RLHF_CHECK(!request.prompt.empty(), where(), ": the prompt is empty");
  RLHF_CHECK(request.num_samples > 0, where(), ": num_samples must be positive");
  RLHF_CHECK(request.stop.max_new_tokens > 0, where(), ": max_new_tokens must be positive");
  const auto length = static_cast<std::int64_t>(request.prompt.size());
  RLHF_CHECK(length < config_.max_positions, where(), ": the prompt has ", length,
             " tokens, which leaves no room in the model's context of ", config_.max_positions);
  for (TokenId token : request.prompt)
    RLHF_CHECK(token >= 0 && token < config_.vocab_size, where(), ": token id ", token,
               " is outside the vocabulary of ", config_.vocab_size);
  for (TokenId token : request.stop.tokens)
    RLHF_CHECK(token >= 0 && token < config_.vocab_size, where(), ": stop token ", token,
               " is outside the vocabulary of ", config_.vocab_size);
  RLHF_CHECK(request.stop.forced_last < config_.vocab_size, where(), ": stop token ",
             request.stop.forced_last, " is outside the vocabulary of ", config_.vocab_size);
  const SamplingOptions& sampling = request.sampling;
  RLHF_CHECK(sampling.temperature >= 0, where(), ": temperature is ", sampling.temperature,
             ", expected at least 0");
  RLHF_CHECK(sampling.top_p >= 0 && sampling.top_p <= 1, where(), ": top_p is ", sampling.top_p,
             ", expected 0 to 1");
  RLHF_CHECK(!sampling.min_p || (*sampling.min_p >= 0 && *sampling.min_p <= 1), where(), ": min_p is ",
             sampling.min_p.value_or(0), ", expected 0 to 1");
  RLHF_CHECK(sampling.repetition_penalty > 0, where(), ": repetition_penalty is ",
             sampling.repetition_penalty, ", expected above 0");
  RLHF_CHECK((request.stop.strings.empty() && request.tool.trigger.empty()) || token_bytes_, where(),
             ": stop strings and tools need a tokenizer");
  request.stop.max_new_tokens = std::min(request.stop.max_new_tokens, config_.max_positions - length);
  Group probe{request, {}, 0, 0, 0};
  const std::int64_t needed = probe.prefix_tokens() / kB + 1 + probe.blocks_per_sample();
  RLHF_CHECK(needed <= cache_.num_blocks(), where(), ": one sample of ", length, " + ",
             request.stop.max_new_tokens, " tokens needs ", needed, " K/V blocks but the cache has ",
             cache_.num_blocks(), "; raise the rollout memory or lower max_new_tokens");
  queue_.push_back(std::move(request));
}

bool RolloutEngine::busy() const {
  return !queue_.empty() || !groups_.empty() || !running_.empty();
}

bool RolloutEngine::admit_group(Group& group) {
  const std::span<const TokenId> prefix(group.request.prompt.data(), size(group.prefix_tokens()));
  group.table = cache_.match(prefix);
  group.prefilled = static_cast<std::int64_t>(group.table.size()) * kB;
  statistics_.cached_prefix_tokens += group.prefilled;
  const std::int64_t needed =
      blocks_of(group.prefix_tokens()) - static_cast<std::int64_t>(group.table.size());
  // Room for the prefix and one whole sample: then the group can always make progress.
  if (cache_.num_available() < needed + group.blocks_per_sample()) {
    cache_.release(group.table);
    group.table.clear();
    return false;
  }
  for (std::int64_t i = 0; i < needed; ++i) group.table.push_back(*cache_.try_allocate());
  return true;
}

void RolloutEngine::fork(Group& group) {
  auto sequence = std::make_unique<Sequence>();
  sequence->group = &group;
  sequence->sample.prompt_id = group.request.prompt_id;
  sequence->sample.tag = group.request.tag;
  sequence->sample.sample_index = group.request.first_sample_index + group.started;
  const std::int64_t shared = group.prefix_tokens() / kB;
  for (std::int64_t b = 0; b < shared; ++b) {
    cache_.add_reference(group.table[size(b)]);
    sequence->table.push_back(group.table[size(b)]);
  }
  for (std::int64_t b = 0; b < group.blocks_per_sample(); ++b)
    sequence->table.push_back(*cache_.try_allocate());
  if (group.prefix_tokens() % kB != 0)
    store_.copy_block(group.table[size(shared)], sequence->table[size(shared)]);
  sequence->position = group.prefix_tokens();
  sequence->pending = {group.request.prompt.back()};
  if (needs_history(group.request.sampling)) sequence->history = group.request.prompt;
  ++group.started;
  ++group.alive;
  running_.push_back(std::move(sequence));
}

void RolloutEngine::admit() {
  const auto has_slot = [&] { return static_cast<std::int64_t>(running_.size()) < options_.max_sequences; };
  for (auto& group : groups_)
    while (group->ready() && group->started < group->request.num_samples && has_slot() &&
           cache_.num_available() >= group->blocks_per_sample())
      fork(*group);
  // Groups being prefilled reserve their samples' slots, so that prefill does not run far ahead of decoding.
  std::int64_t reserved = static_cast<std::int64_t>(running_.size());
  for (const auto& group : groups_)
    reserved += static_cast<std::int64_t>(group->request.num_samples - group->started);
  while (!queue_.empty() && reserved < options_.max_sequences) {
    auto group = std::make_unique<Group>();
    group->request = std::move(queue_.front());
    if (!admit_group(*group)) {
      queue_.front() = std::move(group->request);
      break;
    }
    queue_.pop_front();
    reserved += group->request.num_samples;
    groups_.push_back(std::move(group));
    if (groups_.back()->ready() && has_slot() &&
        cache_.num_available() >= groups_.back()->blocks_per_sample())
      fork(*groups_.back());
  }
}

void RolloutEngine::collect_rows() {
  rows_.tokens.clear();
  rows_.positions.clear();
  rows_.tables.clear();
  sampled_rows_.clear();
  const auto add = [&](TokenId token, std::int64_t position, const std::vector<std::int32_t>& table) {
    rows_.tokens.push_back(token);
    rows_.positions.push_back(static_cast<std::int32_t>(position));
    rows_.tables.push_back(table.data());
  };
  for (auto& sequence : running_) {
    for (TokenId token : sequence->pending) add(token, sequence->position++, sequence->table);
    sequence->pending.clear();
    sampled_rows_.push_back({sequence.get(), rows_.size() - 1});
  }
  const std::int64_t decode_rows = rows_.size();
  for (auto& group : groups_) {
    while (!group->ready() && rows_.size() < std::max(options_.max_tokens_per_step, decode_rows + 1)) {
      add(group->request.prompt[size(group->prefilled)], group->prefilled, group->table);
      ++group->prefilled;
    }
  }
  statistics_.decode_tokens += static_cast<std::int64_t>(sampled_rows_.size());
  statistics_.prefill_tokens += rows_.size() - static_cast<std::int64_t>(sampled_rows_.size());
}

void RolloutEngine::finish_prefill(Group& group) {
  const std::int64_t full = group.prefix_tokens() / kB;
  for (std::int64_t b = 0; b < full; ++b)
    cache_.publish(group.table[size(b)], b == 0 ? std::nullopt : std::optional(group.table[size(b - 1)]),
                   std::span<const TokenId>(group.request.prompt).subspan(size(b * kB), size(kB)));
}

void RolloutEngine::step(const DecoderWeights<float>& weights, WeightVersion version) {
  const double begin = now();
  admit();
  collect_rows();
  if (rows_.size() == 0) return;
  const std::int64_t D = config_.hidden_size;
  const bool decode_only = rows_.size() == static_cast<std::int64_t>(sampled_rows_.size());
  x_.reserve_discard(size(rows_.size() * D));
  runner_.embed(weights, rows_, x_.data());
  runner_.forward_layers(weights, rows_, 0, config_.num_layers, store_, 0, x_.data(), nullptr);
  sample_rows(weights, version);

  for (auto& group : groups_)
    if (group->ready() && group->started == 0) finish_prefill(*group);
  std::erase_if(running_, [&](const std::unique_ptr<Sequence>& sequence) { return sequence->done; });
  std::erase_if(groups_, [&](const std::unique_ptr<Group>& group) {
    if (group->alive > 0 || group->started < group->request.num_samples) return false;
    cache_.release(group->table);
    return true;
  });
  const double seconds = now() - begin;
  ++statistics_.steps;
  statistics_.seconds += seconds;
  if (decode_only) {
    statistics_.decode_only_seconds += seconds;
    statistics_.decode_only_tokens += static_cast<std::int64_t>(sampled_rows_.size());
  }
}

void RolloutEngine::sample_rows(const DecoderWeights<float>& weights, WeightVersion version) {
  const std::int64_t D = config_.hidden_size, V = config_.vocab_size;
  const auto count = static_cast<std::int64_t>(sampled_rows_.size());
  hidden_.reserve_discard(size(count * D));
  logits_.reserve_discard(size(std::min(count, kLogitsRows) * V));
  for (std::int64_t i = 0; i < count; ++i)
    std::copy_n(x_.data() + sampled_rows_[size(i)].row * D, D, hidden_.data() + i * D);
  runner_.final_norm(weights, count, hidden_.data(), hidden_.data(), nullptr, nullptr);
  std::vector<Draw> drawn(size(std::min(count, kLogitsRows)));
  for (std::int64_t begin = 0; begin < count; begin += kLogitsRows) {
    const std::int64_t n = std::min(kLogitsRows, count - begin);
    runner_.linear(weights.head, n, hidden_.data() + begin * D, logits_.data(), false);
    runner_.compute().for_rows(n, 20 * V, [&](std::int64_t i) {
      const Sequence& sequence = *sampled_rows_[size(begin + i)].sequence;
      const GenerationRequest& request = sequence.group->request;
      float* row = logits_.data() + i * V;
      const auto& kernels = runner_.compute().table();
      if (config_.final_softcap > 0) kernels.logits_row(row, V, 1, config_.final_softcap, 0);
      const auto position = static_cast<std::int64_t>(sequence.sample.tokens.size());
      const bool masked = position < request.stop.min_new_tokens && !request.stop.tokens.empty();
      if (masked)
        for (TokenId token : request.stop.tokens) row[token] = -INFINITY;
      const double u = uniform_at(request.seed, request.prompt_id, sequence.sample.sample_index,
                                  static_cast<std::uint32_t>(position));
      static thread_local Sampler sampler;
      SamplingHistory history;
      history.context = sequence.history;
      history.generated = sequence.sample.tokens;
      Draw& draw = drawn[size(i)];
      try {
        draw = sampler.draw(request.sampling, history, {row, size(V)}, u);
      } catch (const InvalidArgument&) {
        // A row that cannot be drawn from; reported with its prompt below.
        draw.log_prob = draw.raw_log_prob = std::nanf("");
      }
      // A greedy choice has probability 1 under its own distribution; the model's log-prob is what callers
      // can use.
      if (is_greedy(request.sampling)) draw.log_prob = draw.raw_log_prob;
      // Where nothing changes the model's distribution, the trainer's kernel gives the log-prob: then sampler
      // and trainer agree bit for bit, and ratios of the first minibatch are exactly 1.
      else if (keeps_all(request.sampling) && !needs_history(request.sampling) && !masked &&
               std::isfinite(draw.log_prob))
        draw.log_prob = static_cast<float>(
            kernels.logits_row(row, V, 1 / request.sampling.temperature, 0, draw.token).logprob);
    });
    for (std::int64_t i = 0; i < n; ++i) {
      Sequence& sequence = *sampled_rows_[size(begin + i)].sequence;
      const Draw& token = drawn[size(i)];
      if (!std::isfinite(token.log_prob))
        fail<Error>("rollout: logits of prompt ", sequence.sample.prompt_id, ", sample ",
                    sequence.sample.sample_index, ", token ", sequence.sample.tokens.size(),
                    " are not finite (weights version ", version, ")");
      const StopOptions& stop = sequence.group->request.stop;
      const bool last = static_cast<std::int64_t>(sequence.sample.tokens.size()) + 1 == stop.max_new_tokens;
      if (last && stop.forced_last >= 0)
        accept(sequence, stop.forced_last, 0.0f, version);
      else
        accept(sequence, token.token, token.log_prob, version);
    }
  }
}

void RolloutEngine::accept(Sequence& sequence, TokenId token, float logprob, WeightVersion version) {
  const GenerationRequest& request = sequence.group->request;
  Sample& sample = sequence.sample;
  const auto append = [&](TokenId id, float lp, std::uint8_t mask) {
    sample.tokens.push_back(id);
    sample.logprobs.push_back(lp);
    sample.weight_versions.push_back(version);
    sample.mask.push_back(mask);
    sequence.pending.push_back(id);
    if (!sequence.history.empty()) sequence.history.push_back(id);
  };
  append(token, logprob, 1);
  const auto is_full = [&] {
    return static_cast<std::int64_t>(sample.tokens.size()) >= request.stop.max_new_tokens;
  };
  const auto& stops = request.stop.tokens;
  if (std::find(stops.begin(), stops.end(), token) != stops.end())
    return finish(sequence, FinishReason::kStop);
  if (!request.stop.strings.empty() || !request.tool.trigger.empty()) {
    const std::size_t before = sequence.text.size();
    sequence.text += token_bytes_(token);
    for (const std::string& stop : request.stop.strings)
      if (sequence.text.find(stop, before - std::min(before, stop.size())) != std::string::npos)
        return finish(sequence, FinishReason::kStopString);
    const std::string& trigger = request.tool.trigger;
    if (!trigger.empty() && sequence.tool_calls < request.tool.max_calls && !is_full()) {
      const std::size_t found = sequence.text.find(trigger, sequence.tool_search_from);
      if (found != std::string::npos) {
        ++sequence.tool_calls;
        for (TokenId forced : request.tool.respond(sequence.text)) {
          if (is_full()) break;
          RLHF_CHECK(forced >= 0 && forced < config_.vocab_size, "rollout: the tool's answer to prompt ",
                     sample.prompt_id, ": token id ", forced, " is outside the vocabulary of ",
                     config_.vocab_size);
          append(forced, 0.0f, 0);
          sequence.text += token_bytes_(forced);
        }
        sequence.tool_search_from = sequence.text.size();
      }
    }
  }
  if (is_full()) finish(sequence, FinishReason::kLength);
}

void RolloutEngine::finish(Sequence& sequence, FinishReason reason) {
  sequence.sample.finish_reason = reason;
  sequence.done = true;
  --sequence.group->alive;
  cache_.release(sequence.table);
  finished_.push_back(std::move(sequence.sample));
}

std::optional<Sample> RolloutEngine::try_take() {
  if (finished_.empty()) return std::nullopt;
  Sample sample = std::move(finished_.front());
  finished_.pop_front();
  return sample;
}

void RolloutEngine::cancel_all() {
  queue_.clear();
  for (auto& sequence : running_) cache_.release(sequence->table);
  running_.clear();
  for (auto& group : groups_) cache_.release(group->table);
  groups_.clear();
}

}  // namespace rlhf

#include "rlhf/train/ppo_rollout.h"

#include "rlhf/distributed/balance.h"
#include "rlhf/train/rank_exchange.h"

namespace rlhf {
namespace {

// Rounds from here on are greedy responses, which have no place in the batch.
constexpr std::uint64_t kGreedyRound = std::uint64_t{1} << 32;

}  // namespace

PpoRollout::PpoRollout(const PpoSetting& setting, PpoModels& models, std::int64_t iteration)
    : setting_(setting),
      algorithm_(setting.options.algorithm),
      models_(models),
      iteration_(iteration),
      slots_(algorithm_.prompts_per_step),
      responses_(algorithm_.prompts_per_step * algorithm_.samples_per_prompt),
      greedy_responses_(algorithm_.advantage.greedy_baseline ? algorithm_.prompts_per_step : 0),
      ranks_(responses_.size()) {}

void PpoRollout::start() {
  before_ = models_.engine->statistics();
  const std::vector<int> ranks = share_out();
  for (std::size_t i = 0; i < ranks_.size(); ++i) ranks_[i] = ranks[i / algorithm_.samples_per_prompt];
  for (std::size_t slot = 0; slot < slots_.size(); ++slot) {
    if (!is_own(slot)) continue;
    ++num_own_groups_;
    submit(slot, 0);
  }
}

bool PpoRollout::is_own(std::size_t slot) const {
  return ranks_[slot * algorithm_.samples_per_prompt] == setting_.context.collective->rank();
}

// The rank of each slot.
std::vector<int> PpoRollout::share_out() const {
  std::vector<double> costs;
  for (std::size_t slot = 0; slot < slots_.size(); ++slot) {
    const Prompt& prompt = prompt_of(slot, 0);
    costs.push_back(static_cast<double>(prompt.tokens.size()) +
                    static_cast<double>(algorithm_.samples_per_prompt) * models_.lengths.of(prompt));
  }
  return balanced_shares(costs, setting_.context.collective->world_size());
}

// Further rounds (dynamic sampling) take prompts from a shuffled stream of their own.
const Prompt& PpoRollout::prompt_of(std::size_t slot, std::int64_t round) const {
  const auto items = step_items(setting_.data.train_prompts.size(), slots_.size(), iteration_,
                                setting_.context.seed + 0x9e3779b9 * static_cast<std::uint64_t>(round),
                                round == 0 ? setting_.options.prompt_order : ItemOrder::kShuffled);
  return setting_.data.train_prompts[items[slot]];
}

void PpoRollout::submit(std::size_t slot, std::int64_t round) {
  slots_[slot] = {&prompt_of(slot, round), round};
  GenerationRequest request =
      make_request(*slots_[slot].prompt, setting_.rollout, models_.policy, setting_.data);
  request.seed = setting_.context.seed + static_cast<std::uint64_t>(iteration_) + 1;
  // A prompt may occur twice in a batch: the slot keeps their draws apart.
  request.prompt_id = slot + static_cast<std::uint64_t>(round) * slots_.size();
  request.tag = static_cast<std::uint64_t>(iteration_);
  if (algorithm_.advantage.greedy_baseline) {
    GenerationRequest greedy = request;
    greedy.sampling.temperature = 0;
    greedy.num_samples = 1;
    greedy.prompt_id += kGreedyRound * slots_.size();
    models_.engine->submit(std::move(greedy));
  }
  if (setting_.adjust_request) return submit_one_by_one(request, slot);
  request.num_samples = static_cast<std::uint32_t>(algorithm_.samples_per_prompt);
  models_.engine->submit(std::move(request));
}

void PpoRollout::submit_one_by_one(const GenerationRequest& request, std::size_t slot) {
  const std::uint64_t first =
      (static_cast<std::uint64_t>(iteration_) * slots_.size() + slot) * algorithm_.samples_per_prompt;
  for (std::uint32_t k = 0; k < algorithm_.samples_per_prompt; ++k) {
    GenerationRequest one = request;
    one.first_sample_index = k;
    setting_.adjust_request(one, first + k);
    models_.engine->submit(std::move(one));
  }
}

std::vector<std::size_t> PpoRollout::accept(Sample sample) {
  const std::size_t slot = sample.prompt_id % slots_.size();
  take(std::move(sample), slot);
  const std::size_t expected = algorithm_.samples_per_prompt + algorithm_.advantage.greedy_baseline;
  if (++slots_[slot].finished < expected || sample_again(slot)) return {};
  if (++num_complete_groups_ == num_own_groups_) measure();
  std::vector<std::size_t> group(algorithm_.samples_per_prompt);
  for (std::size_t k = 0; k < group.size(); ++k) group[k] = slot * algorithm_.samples_per_prompt + k;
  return group;
}

void PpoRollout::take(Sample sample, std::size_t slot) {
  if (sample.prompt_id / slots_.size() >= kGreedyRound)
    accept_greedy(std::move(sample), slot);
  else
    accept_sample(std::move(sample), slot);
}

// Under the ids with which they were sampled, which tell slot and round.
void PpoRollout::exchange() {
  std::vector<Sample> own;
  for (std::size_t slot = 0; slot < slots_.size(); ++slot) {
    if (!is_own(slot)) continue;
    const std::uint64_t id = slot + static_cast<std::uint64_t>(slots_[slot].round) * slots_.size();
    for (std::size_t k = 0; k < algorithm_.samples_per_prompt; ++k) {
      own.push_back(responses_[slot * algorithm_.samples_per_prompt + k].sample);
      own.back().prompt_id = id;
    }
    if (greedy_responses_.empty()) continue;
    own.push_back(greedy_responses_[slot].sample);
    own.back().prompt_id = id + kGreedyRound * slots_.size();
  }
  for (Sample& sample : gather_samples(*setting_.context.collective, std::move(own))) {
    const std::size_t slot = sample.prompt_id % slots_.size();
    if (is_own(slot)) continue;
    const auto round = static_cast<std::int64_t>(sample.prompt_id / slots_.size() % kGreedyRound);
    slots_[slot] = {&prompt_of(slot, round), round};
    take(std::move(sample), slot);
  }
  for (std::size_t slot = 0; slot < slots_.size(); ++slot)
    if (!is_own(slot)) num_resampled_groups_ += static_cast<std::size_t>(slots_[slot].round);
  models_.lengths.observe(responses_);
}

void PpoRollout::accept_sample(Sample sample, std::size_t slot) {
  PpoResponse response = make_response(std::move(sample), slot);
  if (is_own(slot)) models_.judges.begin(response);
  const std::size_t index = slot * algorithm_.samples_per_prompt + response.sample.sample_index;
  trunk_bytes_ -= responses_[index].trunk.size() * sizeof(float);  // of a response that is sampled again
  keep_trunk(response);
  responses_[index] = std::move(response);
}

// ReMax: the greedy response is judged and not trained on.
void PpoRollout::accept_greedy(Sample sample, std::size_t slot) {
  sample.trunk = {};
  greedy_responses_[slot] = make_sampled_response(models_.policy, *slots_[slot].prompt, std::move(sample));
  if (is_own(slot)) models_.judges.begin(greedy_responses_[slot]);
}

// What the generator computed in the layers that are not trained serves the trainer as well, bit for bit.
void PpoRollout::keep_trunk(PpoResponse& response) {
  const std::size_t bytes = response.sample.trunk.size() * sizeof(float);
  if (trunk_bytes_ + bytes <= models_.trunk_cache_bytes) {
    response.trunk = std::move(response.sample.trunk);
    trunk_bytes_ += bytes;
  }
  response.sample.trunk = {};
}

PpoResponse PpoRollout::make_response(Sample sample, std::size_t slot) const {
  PpoResponse response{
      make_sampled_response(models_.policy, *slots_[slot].prompt, std::move(sample)), {}, {}};
  const Sample& answer = response.sample;
  response.scored.group = slot;
  if (!models_.critic && !models_.reward) response.tokens.pop_back();
  response.scored.rollout_log_probs = {answer.logprobs.begin(), answer.logprobs.end()};
  response.scored.log_probs = response.scored.rollout_log_probs;
  response.scored.mask = answer.mask;
  response.scored.ended = answer.finish_reason == FinishReason::kStop;
  response.scored.truncated = is_cut_short(answer.finish_reason);
  return response;
}

// DAPO: a group whose responses all have the same reward teaches nothing; another prompt takes its place.
bool PpoRollout::sample_again(std::size_t slot) {
  const auto& dynamic = algorithm_.dynamic_sampling;
  if (!dynamic.enabled || slots_[slot].round >= static_cast<std::int64_t>(dynamic.max_rounds)) return false;
  const std::size_t first = slot * algorithm_.samples_per_prompt;
  for (std::size_t k = 0; k < algorithm_.samples_per_prompt; ++k)
    models_.judges.judge_by_rules(responses_[first + k], iteration_ + 1);
  // Terms that are normalised on their own teach even where their sums are equal.
  const auto alike = [&](const Score& a, const Score& b) {
    return setting_.data.rules.normalizes() ? a.values == b.values : a.total == b.total;
  };
  for (std::size_t k = 1; k < algorithm_.samples_per_prompt; ++k)
    if (!alike(responses_[first + k].rule_score, responses_[first].rule_score)) return false;
  ++num_resampled_groups_;
  submit(slot, slots_[slot].round + 1);
  return true;
}

void PpoRollout::measure() {
  const GenerationStatistics& after = models_.engine->statistics();
  num_steps_ = after.steps - before_.steps;
  matmul_flops_ = after.matmul_flops - std::exchange(models_.generated_flops, after.matmul_flops);
  const double seconds = after.decode_only_seconds - before_.decode_only_seconds;
  if (seconds > 0)
    decode_tokens_per_s_ =
        static_cast<double>(after.decode_only_tokens - before_.decode_only_tokens) / seconds;
}

}  // namespace rlhf

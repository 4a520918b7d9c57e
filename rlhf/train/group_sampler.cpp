#include "rlhf/train/group_sampler.h"

#include <algorithm>
#include <numeric>

#include "rlhf/core/error.h"
#include "rlhf/train/batching.h"
#include "rlhf/train/episode_metrics.h"
#include "rlhf/train/reward_rating.h"
#include "rlhf/train/term_normalizers.h"

namespace rlhf {

GroupSampler::GroupSampler(std::string stage, const LanguageModel& policy,
                           const Parameters<float>* reward_model, const TaskData& data,
                           const RolloutOptions& rollout, const GroupSamplerOptions& options,
                           const StageContext& context)
    : stage_(std::move(stage)),
      policy_(policy),
      data_(data),
      rollout_(rollout),
      options_(options),
      context_(context),
      judges_{data, reward_model, options.reward_model_weight} {
  RLHF_CHECK(!data.train_prompts.empty(), stage_, ": there are no prompts");
  judges_.check(stage_);
  RLHF_CHECK(!TermNormalizers::needs_whole_batch(data.rules), stage_,
             ": normalize: running of a reward term is for the stage ppo; use group or none");
  for (std::size_t i = 0; i < data.rules.size(); ++i)
    RLHF_CHECK(data.rules.options(i).on_failure != OnFailure::kDrop, stage_,
               ": on_failure: drop of a reward term is for the stage ppo; use stop or score");
  const DecoderWeights<float>& weights = policy.parameters().weights();
  if (rollout.weights != WeightFormat::kFp32)
    packed_.emplace(rollout.weights, weights, weights, context.compute);
  engine_ = make_engine(policy, {rollout, data.train_prompts, context.compute, context.max_blocks, 0, nullptr,
                                 rollout.kv_dtype});
}

std::vector<ResponseGroup> GroupSampler::sample(std::int64_t iteration, std::int64_t num_prompts) {
  Stopwatch watch;
  try {
    std::vector<ResponseGroup> groups = draw(iteration, num_prompts);
    judge(groups, iteration + 1);
    log(groups, iteration + 1);
    seconds_ = watch.seconds();
    return groups;
  } catch (const InternalError&) {
    throw;
  } catch (const Error& error) {
    fail<Error>(stage_, ": iteration ", iteration + 1, ": ", error.what());
  }
}

std::vector<ResponseGroup> GroupSampler::draw(std::int64_t iteration, std::int64_t num_prompts) {
  std::vector<std::size_t> items(data_.train_prompts.size());
  std::iota(items.begin(), items.end(), std::size_t{0});
  if (num_prompts > 0)
    items = step_items(items.size(), static_cast<std::size_t>(num_prompts), iteration, context_.seed);
  std::vector<GenerationRequest> requests;
  for (std::size_t item : items) {
    requests.push_back(make_request(data_.train_prompts[item], rollout_, policy_, data_));
    requests.back().num_samples = static_cast<std::uint32_t>(options_.samples_per_prompt);
    requests.back().seed = context_.seed + static_cast<std::uint64_t>(iteration) + 1;
    // A prompt may occur twice: its place keeps the draws apart.
    requests.back().prompt_id = requests.size() - 1;
  }
  engine_->forget_prefixes();  // their K and V are those of earlier weights
  if (packed_) packed_->refresh(context_.compute);
  const DecoderWeights<float>& weights = packed_ ? packed_->weights() : policy_.parameters().weights();
  std::vector<ResponseGroup> groups(items.size());
  for (Sample& sample : generate_all(*context_.collective, *engine_, weights,
                                     static_cast<WeightVersion>(iteration), std::move(requests))) {
    const std::size_t place = sample.prompt_id;
    groups[place].push_back(
        {make_sampled_response(policy_, data_.train_prompts[items[place]], std::move(sample)), 0});
    if (context_.collective->is_first()) judges_.begin(groups[place].back());
  }
  return groups;
}

void GroupSampler::judge_by_rules(ResponseGroup& group, std::int64_t iteration) const {
  std::vector<const Score*> scores;
  for (GroupResponse& response : group) {
    judges_.judge_by_rules(response, iteration);
    response.score = response.rule_score.total;
    scores.push_back(&response.rule_score);
  }
  if (!data_.rules.normalizes()) return;
  const auto totals = TermNormalizers(data_.rules).totals(scores, iteration);
  for (std::size_t k = 0; k < group.size(); ++k) group[k].score = totals[k];
}

void GroupSampler::judge(std::vector<ResponseGroup>& groups, std::int64_t iteration) {
  std::vector<GroupResponse*> all;
  std::vector<TrainingExample> answers;
  for (ResponseGroup& group : groups) {
    // Once: what a server or a caller's rule says need not be the same twice.
    if (context_.collective->is_first()) judge_by_rules(group, iteration);
    for (GroupResponse& response : group) {
      all.push_back(&response);
      if (judges_.reward_model_weight != 0) answers.push_back(to_example(response));
    }
  }
  if (judges_.reward_model_weight != 0) judge_by_model(all, answers);
  std::vector<double> scores;
  for (const GroupResponse* response : all) scores.push_back(response->score);
  context_.collective->broadcast(std::span(scores), 0);
  for (std::size_t i = 0; i < all.size(); ++i) all[i]->score = scores[i];
}

void GroupSampler::judge_by_model(const std::vector<GroupResponse*>& all,
                                  const std::vector<TrainingExample>& answers) const {
  SequencePass<float> pass(judges_.reward_model->config(), context_.compute);
  const auto outputs =
      read_outputs(pass, judges_.reward_model->weights(), data_.reward_reading, answers, kRatedTokensPerPass);
  for (std::size_t i = 0; i < all.size(); ++i) {
    all[i]->model_score = data_.reward_reading.score(outputs[i]);
    all[i]->score += judges_.reward_model_weight * all[i]->model_score;
  }
}

void GroupSampler::log(const std::vector<ResponseGroup>& groups, std::int64_t iteration) const {
  std::int64_t left = options_.samples_to_log;
  for (const ResponseGroup& group : groups)
    for (const GroupResponse& response : group)
      if (left-- > 0)
        context_.observer->sample(stage_, to_json_line(response, iteration, response.score, judges_));
}

Metrics GroupSampler::metrics(const std::vector<ResponseGroup>& groups) const {
  double count = 0, score = 0, best = 0, tokens = 0, ended = 0;
  std::vector<const Sample*> samples;
  for (const ResponseGroup& group : groups) {
    best += best_of(group).score / static_cast<double>(groups.size());
    for (const GroupResponse& response : group) {
      samples.push_back(&response.sample);
      ++count;
      score += response.score;
      tokens += static_cast<double>(response.sample.tokens.size());
      ended += response.sample.finish_reason == FinishReason::kStop;
    }
  }
  Metrics out = {{"reward/total", score / count},
                 {"reward/best", best},
                 {"rollout/mean_length", tokens / count},
                 {"rollout/eos_rate", ended / count},
                 {"time/generate_s", seconds_}};
  append_episode_metrics(samples, out);
  return out;
}

const GroupResponse& best_of(const ResponseGroup& group) {
  return *std::ranges::max_element(group, {}, &GroupResponse::score);
}

const GroupResponse& worst_of(const ResponseGroup& group) {
  return *std::ranges::min_element(group, {}, &GroupResponse::score);
}

TrainingExample to_example(const SampledResponse& response) {
  TrainingExample example{response.tokens, std::vector<std::uint8_t>(response.prompt->tokens.size(), 0)};
  example.loss_mask.insert(example.loss_mask.end(), response.sample.mask.begin(), response.sample.mask.end());
  return example;
}

}  // namespace rlhf

// What PpoIteration says of a finished iteration.
#include <algorithm>
#include <cmath>

#include "rlhf/train/episode_metrics.h"
#include "rlhf/train/ppo_iteration.h"
#include "rlhf/train/rank_exchange.h"

namespace rlhf {

// What the ranks have measured of their parts of the batch.
void PpoIteration::add_measures_of_ranks() {
  if (collective_.world_size() == 1) return;
  add_ranks(collective_, loss_sums_);
  add_ranks(collective_, pass_sums_);
  auto passes = static_cast<double>(num_trained_);
  double* sums[] = {&passes,       &gap_sum_,        &gap_count_,     &mismatch_k1_,
                    &mismatch_k3_, &mismatch_count_, &staleness_sum_, &staleness_count_};
  std::vector<double> values;
  for (const double* sum : sums) values.push_back(*sum);
  collective_.all_reduce(std::span(values));
  for (std::size_t i = 0; i < values.size(); ++i) *sums[i] = values[i];
  num_trained_ = static_cast<std::size_t>(passes);
  std::vector<double> maxima(2 * static_cast<std::size_t>(collective_.world_size()));
  maxima[2 * static_cast<std::size_t>(collective_.rank())] = gap_max_;
  maxima[2 * static_cast<std::size_t>(collective_.rank()) + 1] = staleness_max_;
  collective_.all_reduce(std::span(maxima));
  for (std::size_t i = 0; i < maxima.size(); i += 2) {
    gap_max_ = std::max(gap_max_, maxima[i]);
    staleness_max_ = std::max(staleness_max_, maxima[i + 1]);
  }
}

// Means of the reward model's objectives, where it has several.
void PpoIteration::measure_objectives(Metrics& out) const {
  const auto& objectives = setting_.data.reward_reading.options().objectives;
  for (std::size_t k = 0; k < objectives.size(); ++k) {
    double sum = 0;
    for (const PpoResponse& response : responses_) sum += response.model_outputs.at(k);
    out.emplace_back("reward/model/" + objectives[k].name, sum / static_cast<double>(responses_.size()));
  }
}

// What each rule says, and what part of the total it makes.
void PpoIteration::append_term_metrics(std::span<const Score> scores, Metrics& out) const {
  const RewardComposition& rules = setting_.data.rules;
  const auto statistics = rules.summarise(scores, number());
  for (std::size_t i = 0; i < statistics.size(); ++i) {
    const TermStatistics& term = statistics[i];
    const TermOptions& options = rules.options(i);
    const std::string name = "reward/" + term.name;
    out.emplace_back(name, term.mean);
    out.emplace_back(name + "_stddev", term.stddev);
    if (statistics.size() > 1) out.emplace_back(name + "_share", term.share);
    if (options.clip_min || options.clip_max) out.emplace_back(name + "_clipped", term.clipped);
    if (options.gate) out.emplace_back(name + "_gated", term.gated);
    if (options.on_failure != OnFailure::kStop) out.emplace_back(name + "_failed", term.failed);
    if (!options.schedule.empty()) out.emplace_back(name + "_weight", rules.weight(i, number()));
  }
}

Metrics PpoIteration::metrics() const {
  const double n = static_cast<double>(responses_.size());
  double total = 0, rules = 0, model = 0, length = 0, squares = 0, prompt = 0, ended = 0;
  std::vector<Score> scores;
  std::vector<const Sample*> samples;
  for (const PpoResponse& response : responses_) {
    samples.push_back(&response.sample);
    total += response.scored.score / n;
    rules += response.rule_score.total / n;
    model += response.model_score / n;
    const auto tokens = static_cast<double>(response.sample.tokens.size());
    length += tokens / n;
    squares += tokens * tokens / n;
    prompt += static_cast<double>(response.prompt->tokens.size()) / n;
    ended += response.scored.ended / n;
    if (!setting_.data.rules.empty()) scores.push_back(response.rule_score);
  }
  Metrics out = {{"reward/total", total}, {"reward/rules", rules}};
  if (models_.reward) {
    out.emplace_back("reward/model", model);
    measure_objectives(out);
  }
  append_term_metrics(scores, out);
  std::map<std::string, std::pair<double, double>> tasks;  // sum of rule scores, count
  for (const PpoResponse& response : responses_) {
    auto& [sum, count] = tasks[response.prompt->task];
    sum += response.rule_score.total;
    ++count;
  }
  if (tasks.size() > 1)
    for (const auto& [task, sums] : tasks) out.emplace_back("reward/task/" + task, sums.first / sums.second);
  out.emplace_back("rollout/mean_length", length);
  out.emplace_back("rollout/length_stddev", std::sqrt(std::max(0.0, squares - length * length)));
  out.emplace_back("rollout/prompt_tokens", prompt);
  out.emplace_back("rollout/eos_rate", ended);
  append_episode_metrics(samples, out);
  if (gap_count_ > 0) {
    out.emplace_back("rollout/logprob_gap_mean", gap_sum_ / gap_count_);
    out.emplace_back("rollout/logprob_gap_max", gap_max_);
  }
  if (mismatch_count_ > 0) {
    out.emplace_back("rollout/mismatch_kl", mismatch_k1_ / mismatch_count_);
    out.emplace_back("rollout/mismatch_k3_kl", mismatch_k3_ / mismatch_count_);
  }
  if (setting_.schedule.staleness() > 0 && staleness_count_ > 0) {
    out.emplace_back("rollout/staleness_mean", staleness_sum_ / staleness_count_);
    out.emplace_back("rollout/staleness_max", staleness_max_);
  }
  const double passes = static_cast<double>(std::max<std::size_t>(1, num_trained_));
  const double steps = static_cast<double>(std::max<std::size_t>(1, num_optimized_));
  for (const auto& [name, sum] : loss_sums_) out.emplace_back(name, sum / steps);
  for (const auto& [name, sum] : pass_sums_) out.emplace_back(name, sum / passes);
  for (const auto& [name, value] : experience_.metrics) out.emplace_back(name, value);
  out.emplace_back("time/judge_s", judge_seconds_);
  out.emplace_back("train/gradient_norm", gradient_norms_ / steps);
  if (models_.critic) out.emplace_back("train/critic_gradient_norm", critic_gradient_norms_ / steps);
  out.emplace_back("train/skipped_steps", skipped_steps_);
  out.emplace_back("train/without_gradient", static_cast<double>(num_skipped_) / n);
  out.emplace_back("train/learning_rate", learning_rate(models_.policy_optimizer.options()));
  out.emplace_back("train/kl_coefficient", state_.kl.coefficient());
  return out;
}

}  // namespace rlhf

#pragma once

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "rlhf/ppo/experience.h"
#include "rlhf/schedule/task.h"
#include "rlhf/train/ppo_models.h"

namespace rlhf {

/// What surrounds the iterations of a PPO stage.
struct PpoSetting {
  const TaskData& data;
  const RolloutOptions& rollout;
  const PpoStageOptions& options;
  const StageContext& context;
  /// Changes the request of a rollout slot before it is submitted, e.g. to give it a recorded length. Slots
  /// count over the run: iteration * prompts_per_step + place in the batch. Empty = nothing is changed.
  std::function<void(GenerationRequest& request, std::uint64_t slot)> adjust_request = {};
};

/// One response of a rollout batch and all that is known about it.
struct PpoResponse {
  const Prompt* prompt = nullptr;
  Sample sample;
  std::string text;
  std::vector<TokenId> tokens;  ///< prompt and response
  Score rule_score;
  double model_score = 0;
  ppo::ScoredResponse scored;
  std::vector<float> trunk;  ///< [tokens, D] of the frozen layers; empty when it is not kept

  /// Position whose hidden state predicts response token t.
  std::int64_t predictor(std::size_t t) const {
    return static_cast<std::int64_t>(prompt->tokens.size() + t) - 1;
  }
};

/// The tasks of one PPO iteration (Schulman et al. 2017, algorithm 1) for a scheduling policy: a rollout
/// batch is generated, scored, turned into advantages, and trained on in `epochs` x `mini_batches` optimizer
/// steps.
class PpoIteration : public schedule::IterationTasks {
 public:
  PpoIteration(const PpoSetting& setting, PpoModels& models, ppo::KlController& kl, std::int64_t iteration);

  std::size_t num_samples() const override { return responses_.size(); }
  std::size_t num_optimizer_steps() const override;
  std::size_t num_micro_batches(std::size_t step) const override;

  std::vector<schedule::SampleIndex> generate() override;
  void score(std::span<const schedule::SampleIndex> samples) override;
  void compute_advantages() override;
  void train(std::size_t step, std::size_t micro_batch) override;
  void optimize(std::size_t step) override;
  void publish() override {}  // generation reads the trained weights themselves

  const std::vector<PpoResponse>& responses() const { return responses_; }
  /// Metrics of the finished iteration; names in docs/reference/metrics.md.
  Metrics metrics() const;

 private:
  struct Pass;
  using Indices = std::vector<std::size_t>;

  void submit(std::size_t slot, std::int64_t round);
  void accept(Sample sample);
  bool sample_again(std::size_t slot);
  void score_by_rules(PpoResponse& response);
  void score_by_models(const Indices& samples);
  void run_trunk(const Indices& samples, const Pass& pass);
  void plan_updates();
  void train_policy(const Indices& samples, const Pass& pass, std::size_t step);
  void train_critic(const Indices& samples, const Pass& pass, std::size_t step);
  bool recompute_old_log_probs() const;
  bool has_next_value(const PpoResponse& response) const;
  double learning_rate(const ppo::OptimizerOptions& options) const;
  std::string prompt_ids(const Indices& samples) const;

  /// One optimizer step: its responses, in micro-batches, and the totals that its losses are divided by.
  struct Update {
    std::vector<Indices> micro_batches;
    ppo::AggregationContext policy, value;
  };
  /// A group's place in the batch. Its prompt changes when dynamic sampling takes another one.
  struct Slot {
    const Prompt* prompt = nullptr;
    std::int64_t round = 0;
    std::size_t finished = 0;
  };

  const PpoSetting& setting_;
  const ppo::PpoOptions& algorithm_;
  PpoModels& models_;
  ppo::KlController& kl_;
  std::int64_t iteration_;
  GenerationStatistics before_;  ///< of the engine when the iteration began
  std::vector<Slot> slots_;
  std::vector<PpoResponse> responses_;  ///< slot by slot, samples_per_prompt each
  ppo::Experience experience_;
  std::vector<Update> updates_;
  std::size_t trunk_bytes_ = 0;

  std::map<std::string, double> loss_sums_;  ///< over micro-batches
  std::size_t num_trained_ = 0, num_optimized_ = 0;
  double gradient_norms_ = 0, critic_gradient_norms_ = 0, skipped_steps_ = 0, resampled_groups_ = 0;
  double gap_sum_ = 0, gap_max_ = 0, gap_count_ = 0;  ///< |sampler's - trainer's log-prob|
};

}  // namespace rlhf

#pragma once

#include <deque>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "rlhf/ppo/experience.h"
#include "rlhf/ppo/policy_loss.h"
#include "rlhf/train/micro_batch_pool.h"
#include "rlhf/train/ppo_batch.h"
#include "rlhf/train/ppo_models.h"

namespace rlhf {

/// Optimizer steps on one rollout batch.
std::size_t num_optimizer_steps(const ppo::PpoOptions& algorithm);

/// The train lane's half of an iteration (Schulman et al. 2017, algorithm 1): finished responses are scored,
/// turned into advantages, and trained on in `epochs` x `mini_batches` optimizer steps. Responses may come a
/// group at a time; the update is the same as if all had come at once.
///
/// With several ranks all of a batch is given to `score` at once: each scores what it has sampled, all
/// compute the advantages of the whole batch, and each trains a part of every optimizer step.
class PpoIteration {
 public:
  using Indices = std::vector<std::size_t>;

  /// @param samples of the rollout batch, being filled; group by group they are handed to `score`
  PpoIteration(const PpoSetting& setting, PpoModels& models, PpoState& state, std::int64_t iteration,
               const PpoSamples& samples);

  /// The schedule::Workload functions of these names.
  void score(std::span<const std::size_t> samples);
  void compute_advantages(std::span<const std::size_t> samples);
  std::size_t num_micro_batches(std::size_t step) const { return updates_.at(step).micro_batches.size(); }
  void train(std::size_t step, std::size_t micro_batch);
  void optimize(std::size_t step);

  /// Metrics of the finished iteration; names in docs/reference/metrics.md.
  Metrics metrics() const;

 private:
  struct Pass;
  struct Rows;

  // scoring
  void score_own(std::span<const std::size_t> samples);
  void score_by_models(const Indices& samples);
  void run_trunk(const Indices& samples, const Pass& pass);
  std::vector<double> log_probs(const DecoderWeights<float>& weights, const Pass& pass);
  std::vector<double> squared_probabilities(const DecoderWeights<float>& weights, const Pass& pass);
  std::vector<double> scalars(const DecoderWeights<float>& weights, const PackedRows& packed,
                              const std::vector<std::int64_t>& rows, std::size_t num_outputs = 1);
  void give(const Indices& samples, const std::vector<double>& flat,
            std::vector<double> ppo::ScoredResponse::*field);
  void score_by_policy(const Indices& samples, const Pass& pass);
  void score_by_reward_model(const Indices& samples, const Pass& pass);
  void take_model_score(PpoResponse& response, std::vector<double> outputs,
                        const std::vector<std::size_t>& positions);
  void score_by_critic(const Indices& samples, const Pass& pass);
  void score_greedy(const Indices& samples);
  void score_greedy_by_model(const Indices& groups);
  void measure_gap(const Indices& samples);
  void check_staleness(std::span<const std::size_t> samples);
  bool recompute_old_log_probs() const;
  bool runs_policy() const;
  bool has_next_value(const PpoResponse& response) const;

  // advantages
  void prepare_group(const Indices& group);
  void normalize_scores(std::vector<ppo::ScoredResponse>& scored);
  void complete();
  void plan_update(std::size_t step);
  Indices members(std::size_t step) const;
  /// Number of the iteration as in metrics, from 1.
  std::int64_t number() const { return iteration_ + 1; }
  std::vector<Indices> split_into_groups(std::span<const std::size_t> samples) const;
  /// Adds what normalised reward terms make of the groups' responses to their scores.
  void add_normalized_rules(const std::vector<Indices>& groups);
  bool trains(std::size_t response) const;
  std::vector<std::span<const TokenId>> sequences(const Indices& samples) const;

  // training
  void add_distillation(const Pass& pass, const ppo::PolicyLossInputs& inputs, std::size_t step);
  void skip_micro_batch();
  void train_policy(const Indices& samples, const Pass& pass, std::size_t step);
  void measure_mismatch(const ppo::PolicyLossInputs& inputs);
  void train_critic(const Indices& samples, const Pass& pass, std::size_t step);
  void add_measures_of_ranks();
  void measure_objectives(Metrics& out) const;
  void append_term_metrics(std::span<const Score> scores, Metrics& out) const;
  double learning_rate(const ppo::OptimizerOptions& options) const;
  std::string prompt_ids(const Indices& samples) const;

  /// One optimizer step: its responses in micro-batches, and the totals that its losses are divided by.
  /// Before the batch is complete the totals are not known; then they are 1 and the gradient is divided at
  /// the end.
  struct Update {
    std::vector<Indices> micro_batches;
    ppo::AggregationContext policy, value;
    double policy_divisor = 1, value_divisor = 1;
    bool begun_early = false;
    std::map<std::string, double> losses;  ///< sums over its micro-batches, not yet divided
  };
  /// Where the training data of a response is.
  struct Place {
    const ppo::Experience* experience = nullptr;
    std::size_t row = 0;
  };

  const PpoSetting& setting_;
  ppo::PpoOptions algorithm_;  ///< the setting's, completed by the rollout's options
  PpoModels& models_;
  PpoState& state_;
  std::int64_t iteration_;
  std::vector<PpoResponse>& responses_;
  std::vector<SampledResponse>& greedy_responses_;
  const std::vector<int>& ranks_;
  Collective& collective_;
  bool whole_batch_;

  std::deque<ppo::Experience> parts_;  ///< of groups, until the batch is complete
  ppo::Experience experience_;         ///< of the complete batch, in the order of the responses
  std::vector<Place> places_;
  std::vector<bool> in_first_update_;
  MicroBatchPool pool_;
  std::vector<Update> updates_;
  std::size_t num_advantaged_ = 0;
  std::size_t trunk_bytes_ = 0;

  std::map<std::string, double> loss_sums_;  ///< over optimizer steps
  std::map<std::string, double> pass_sums_;  ///< over micro-batches
  std::size_t num_trained_ = 0, num_optimized_ = 0, num_skipped_ = 0;
  double gradient_norms_ = 0, critic_gradient_norms_ = 0, skipped_steps_ = 0;
  double gap_sum_ = 0, gap_max_ = 0, gap_count_ = 0;  ///< |sampler's - trainer's log-prob|
  double mismatch_k1_ = 0, mismatch_k3_ = 0, mismatch_count_ = 0;
  double judge_seconds_ = 0;
  double staleness_sum_ = 0, staleness_max_ = 0, staleness_count_ = 0;
};

}  // namespace rlhf

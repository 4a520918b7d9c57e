#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>

#include "rlhf/schedule/overlap_trial.h"
#include "rlhf/schedule/thread_share.h"
#include "rlhf/schedule/workload.h"
#include "rlhf/train/ppo_iteration.h"
#include "rlhf/train/ppo_rollout.h"

namespace rlhf {

/// PPO iterations as tasks for a scheduling policy: PpoRollout on the generate lane, PpoIteration on the
/// train lane, over one engine and one set of models.
///
/// On-policy, generation reads the weights that are trained. Off-policy modes keep a copy of what learns, and
/// `publish` refreshes it between two decode steps.
class PpoWorkload : public schedule::Workload {
 public:
  /// One iteration, both halves.
  struct Batch {
    Batch(const PpoSetting& setting, PpoModels& models, PpoState& state, std::int64_t number)
        : rollout(setting, models, number),
          training(setting, models, state, number,
                   {rollout.responses(), rollout.greedy_responses(), rollout.ranks()}) {}
    PpoRollout rollout;
    PpoIteration training;
  };
  using Finish = std::function<void(std::int64_t iteration, const Batch&, const schedule::IterationTimes&)>;

  /// @param finish reports an iteration and keeps a checkpoint
  /// @param first iteration that will be started
  /// @param version of the weights that generation begins with
  PpoWorkload(const PpoSetting& setting, PpoModels& models, PpoState& state, std::int64_t first,
              WeightVersion version, Finish finish);

  std::size_t num_samples() const override;
  std::size_t num_optimizer_steps() const override;
  bool needs_whole_batch() const override;
  std::vector<schedule::FinishedSample> generate(std::int64_t last_iteration) override;
  void score(std::int64_t iteration, std::span<const schedule::SampleIndex> samples) override;
  void compute_advantages(std::int64_t iteration, std::span<const schedule::SampleIndex> samples) override;
  std::size_t num_micro_batches(std::int64_t iteration, std::size_t step) const override;
  void train(std::int64_t iteration, std::size_t step, std::size_t micro_batch) override;
  void optimize(std::int64_t iteration, std::size_t step) override;
  void finish(std::int64_t iteration, const schedule::IterationTimes& times) override;
  void publish(std::int64_t iteration) override;
  bool overlap_pays() const override { return trial_.overlaps(); }
  void lanes_changed(bool generate_busy, bool train_busy) override;

 private:
  Batch& batch(std::int64_t iteration) const;
  void start_up_to(std::int64_t last_iteration);
  void step_engine(std::int64_t last_iteration);  ///< in a turn of the memory
  std::vector<schedule::FinishedSample> generate_with_ranks(std::int64_t iteration);

  const PpoSetting& setting_;
  PpoModels& models_;
  PpoState& state_;
  Finish finish_;
  mutable std::mutex batches_mutex_;
  std::map<std::int64_t, std::unique_ptr<Batch>> batches_;  ///< started and not finished
  std::int64_t next_to_start_;
  schedule::ThreadShare share_;
  schedule::OverlapTrial trial_;
  WeightVersion version_;  ///< of the weights that generation reads; changes between decode steps
};

}  // namespace rlhf

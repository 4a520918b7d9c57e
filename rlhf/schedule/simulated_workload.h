#pragma once

#include <map>
#include <vector>

#include "rlhf/schedule/simulated_engine.h"

namespace rlhf::schedule {

/// The run that is simulated: what a run file says about its batches.
struct SimulatedRun {
  std::int64_t iterations = 1;
  std::size_t prompts = 1;  ///< of a batch, over all devices
  std::size_t samples_per_prompt = 1;
  std::size_t epochs = 1, mini_batches = 1;
  std::size_t max_tokens_per_micro_batch = 1024;  ///< of one device
  bool needs_whole_batch = false;
  std::int64_t max_new_tokens = 64;
  EngineLimits engine;  ///< of one device
  std::uint64_t seed = 1;
};

/// Tokens of a response: a function of the seed and the place of the sample in the run, whatever the mode and
/// the number of devices.
std::int64_t response_tokens(const SimulatedRun& run, const LengthModel& lengths, std::int64_t iteration,
                             std::size_t prompt, std::size_t sample);

/// One device's share of a simulated run. Calls change the state at once; what they would have taken is asked
/// for afterwards.
class SimulatedWorkload : public Workload {
 public:
  struct Cost {
    double compute_s = 0;  ///< on the device, alone on it
    double reward_s = 0;   ///< waiting for the reward servers
  };

  /// `rank` of `num_ranks` gets an equal share of the prompts, to within one. The costs must outlive it.
  SimulatedWorkload(const SimulatedRun& run, const CostModel& costs, std::size_t rank, std::size_t num_ranks);

  std::size_t num_samples() const override { return num_prompts_ * run_.samples_per_prompt; }
  std::size_t num_optimizer_steps() const override { return run_.epochs * parts_; }
  bool needs_whole_batch() const override { return run_.needs_whole_batch; }
  std::vector<FinishedSample> generate(std::int64_t last_iteration) override;
  void score(std::int64_t iteration, std::span<const SampleIndex> samples) override;
  void compute_advantages(std::int64_t iteration, std::span<const SampleIndex> samples) override;
  std::size_t num_micro_batches(std::int64_t iteration, std::size_t step) const override;
  void train(std::int64_t iteration, std::size_t step, std::size_t micro_batch) override;
  void optimize(std::int64_t iteration, std::size_t step) override;
  void finish(std::int64_t iteration, const IterationTimes& times) override;
  void publish(std::int64_t iteration) override;

  /// What the last call on a lane cost.
  Cost cost(Lane lane) const { return costs_of_last_[static_cast<std::size_t>(lane)]; }
  const std::vector<std::int64_t>& tokens_by_staleness() const { return engine_.tokens_by_staleness(); }
  /// Response tokens of the iterations that are finished.
  std::int64_t trained_tokens() const { return trained_tokens_; }
  /// Samples that micro-batches of the first epoch have held, of the iterations that are finished.
  std::size_t trained_samples() const { return trained_samples_; }

 private:
  struct MicroBatch {
    std::size_t num_samples = 0, num_tokens = 0;
  };
  struct Batch {
    std::vector<std::int64_t> lengths;    ///< [samples]
    std::vector<std::size_t> unfinished;  ///< [prompts] samples that are still decoded
    std::vector<SampleIndex> pending;     ///< of the first step, advantages known, in no micro-batch
    std::size_t num_seen = 0, num_seen_tokens = 0;  ///< of the first step
    std::size_t num_advantaged = 0;
    std::vector<std::vector<MicroBatch>> steps;  ///< [optimizer steps]
  };

  void start(std::int64_t iteration);
  Batch& batch(std::int64_t iteration) { return batches_.at(iteration); }
  void set_cost(Lane lane, double compute_s, double reward_s = 0);
  std::size_t group_of(SampleIndex sample) const { return sample / run_.samples_per_prompt; }
  std::size_t pass_tokens(const Batch& batch, SampleIndex sample, std::size_t group) const;
  std::vector<MicroBatch> cut(const Batch& batch, std::vector<SampleIndex>& samples, std::size_t kept) const;
  void add_pending(Batch& batch, std::span<const SampleIndex> samples);
  bool belongs(SampleIndex sample, std::size_t step) const {
    return sample / mini_batch_unit_ % parts_ == step % parts_;
  }
  double reward_wait_s();

  SimulatedRun run_;
  const CostModel& costs_;
  std::size_t rank_, first_prompt_, num_prompts_, parts_, mini_batch_unit_;
  std::int64_t prompt_tokens_;
  SimulatedEngine engine_;
  std::map<std::int64_t, Batch> batches_;  ///< started and not finished
  std::int64_t next_to_start_ = 0;
  std::array<Cost, kAllLanes.size()> costs_of_last_{};
  std::uint32_t num_reward_calls_ = 0;
  std::int64_t trained_tokens_ = 0;
  std::size_t trained_samples_ = 0;
};

}  // namespace rlhf::schedule

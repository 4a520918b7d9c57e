#pragma once

#include <cstdint>
#include <vector>

#include "rlhf/train/ppo_batch.h"
#include "rlhf/train/ppo_models.h"

namespace rlhf {

/// The generate lane's half of an iteration: which prompts are asked, and what becomes of their samples.
class PpoRollout {
 public:
  PpoRollout(const PpoSetting& setting, PpoModels& models, std::int64_t iteration);

  /// Hands the batch's prompts to the engine; with several ranks those of this one, shared out by the lengths
  /// that are expected.
  void start();
  /// Takes a sample of this iteration. @return the indices of its group when that is complete, else nothing
  std::vector<std::size_t> accept(Sample sample);

  /// Whether all groups of this rank are complete.
  bool is_complete() const { return num_complete_groups_ == num_own_groups_; }
  /// Gives the other ranks the samples of this one, and takes theirs. After is_complete.
  void exchange();

  /// Of each response: the rank that samples it.
  const std::vector<int>& ranks() const { return ranks_; }
  /// Slot by slot, samples_per_prompt each.
  std::vector<PpoResponse>& responses() { return responses_; }
  const std::vector<PpoResponse>& responses() const { return responses_; }
  /// ReMax: the greedy response of each slot; empty without greedy_baseline.
  std::vector<SampledResponse>& greedy_responses() { return greedy_responses_; }
  std::size_t num_resampled_groups() const { return num_resampled_groups_; }
  /// Tokens per second of decode steps without prefill, while this batch was generated; 0 = there were none.
  double decode_tokens_per_s() const { return decode_tokens_per_s_; }
  /// Steps of the engine while this batch was generated; with overlap also those of its neighbours.
  std::int64_t num_engine_steps() const { return num_steps_; }
  /// Floating-point operations of the engine since the batch before was complete.
  double matmul_flops() const { return matmul_flops_; }

 private:
  /// A group's place in the batch. Its prompt changes when dynamic sampling takes another one.
  struct Slot {
    const Prompt* prompt = nullptr;
    std::int64_t round = 0;
    std::size_t finished = 0;  ///< samples, and the greedy response where there is one
  };

  bool is_own(std::size_t slot) const;
  std::vector<int> share_out() const;
  const Prompt& prompt_of(std::size_t slot, std::int64_t round) const;
  void take(Sample sample, std::size_t slot);
  void submit(std::size_t slot, std::int64_t round);
  void submit_one_by_one(const GenerationRequest& request, std::size_t slot);
  void keep_trunk(PpoResponse& response);
  PpoResponse make_response(Sample sample, std::size_t slot) const;
  void accept_sample(Sample sample, std::size_t slot);
  void accept_greedy(Sample sample, std::size_t slot);
  bool sample_again(std::size_t slot);
  void measure();

  const PpoSetting& setting_;
  const ppo::PpoOptions& algorithm_;
  PpoModels& models_;
  std::int64_t iteration_;
  GenerationStatistics before_;  ///< of the engine when the iteration began
  std::vector<Slot> slots_;
  std::vector<PpoResponse> responses_;
  std::vector<SampledResponse> greedy_responses_;
  std::vector<int> ranks_;
  std::size_t num_own_groups_ = 0, num_complete_groups_ = 0, num_resampled_groups_ = 0;
  std::size_t trunk_bytes_ = 0;  ///< of all responses
  std::int64_t num_steps_ = 0;
  double matmul_flops_ = 0;
  double decode_tokens_per_s_ = 0;
};

}  // namespace rlhf

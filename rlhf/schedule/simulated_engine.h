#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <vector>

#include "rlhf/schedule/cost_model.h"
#include "rlhf/schedule/workload.h"

namespace rlhf::schedule {

/// Bounds of continuous batching; those of the rollout engine.
struct EngineLimits {
  std::int64_t max_sequences = 32;         ///< samples that decode at once
  std::int64_t max_tokens_per_step = 512;  ///< decode tokens and prefill chunk of a step
};

/// The rollout engine without a model: admission, chunked prefill and continuous batching as RolloutEngine
/// does them, with lengths that are known and costs in place of computing.
class SimulatedEngine {
 public:
  /// The samples of a prompt. `lengths`: tokens of each response, at least 1.
  struct Request {
    std::int64_t iteration = 0;
    SampleIndex first_sample = 0;
    std::int64_t prompt_tokens = 1;
    std::vector<std::int64_t> lengths;
  };

  SimulatedEngine(const EngineLimits& limits, const DecodeCosts& costs) : limits_(limits), costs_(costs) {}

  void submit(Request request) { queue_.push_back(std::move(request)); }
  bool busy() const { return !queue_.empty() || !groups_.empty() || !running_.empty(); }
  /// Does at most `max_steps` (>= 1) steps, fewer when a sample finishes or prompts enter. @return the steps
  std::int64_t run(std::int64_t max_steps);
  /// Seconds of the steps since the last call.
  double take_seconds();
  /// Samples that finished since the last call, in the order in which they started.
  std::vector<FinishedSample> take_finished();

  /// Weights that the next steps read.
  void set_version(std::int64_t version);
  /// Tokens by age: entry n counts those whose weights were n versions behind those they are trained on, up
  /// to the last finished sample or change of weights.
  const std::vector<std::int64_t>& tokens_by_staleness() const { return tokens_by_staleness_; }

 private:
  struct Group {
    Request request;
    std::int64_t prefill_left = 0;
    std::size_t started = 0;
  };
  struct Sequence {
    FinishedSample sample;
    std::int64_t counted = 0;  ///< steps whose tokens tokens_by_staleness_ has
    std::int64_t finish = 0;   ///< step after which it is complete
    std::int64_t tokens = 0;   ///< prompt and response
    std::int64_t number = 0;   ///< in the order of starting
  };

  void admit();
  void fork(Group& group);
  bool has_slot() const { return num_running() < limits_.max_sequences; }
  std::int64_t num_running() const { return static_cast<std::int64_t>(running_.size()); }
  std::int64_t prefill();
  bool is_steady() const;
  void count_tokens(Sequence& sequence);
  void finish_sequences();

  EngineLimits limits_;
  DecodeCosts costs_;
  std::deque<Request> queue_;
  std::deque<Group> groups_;       ///< with samples that have not started
  std::vector<Sequence> running_;  ///< a heap, the first to finish on top
  std::vector<FinishedSample> finished_;
  std::vector<std::int64_t> tokens_by_staleness_;
  std::int64_t step_ = 0, started_ = 0, context_tokens_ = 0, version_ = 0;
  double seconds_ = 0;
};

}  // namespace rlhf::schedule

#pragma once
// A workload without models: it checks that every call is one the task graph allows, counts what was done,
// and lets the test decide when samples finish and what fails.

#include <atomic>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "rlhf/core/error.h"
#include "rlhf/core/random.h"
#include "rlhf/schedule/workload.h"

namespace rlhf::schedule {

class FakeWorkload : public Workload {
 public:
  std::size_t samples = 4, steps = 2, micro_batches = 2;
  bool whole_batch = false;
  std::atomic<bool> pays = true;
  bool pays_by_turns = false;  ///< from one iteration to the next
  std::int64_t max_staleness = 0;
  bool in_flight = false;
  std::uint64_t seed = 1;
  std::function<void(Task, std::int64_t)> before;  ///< of every call: sleeps, throws

  std::vector<std::string> calls;  ///< of the train lane
  std::map<std::int64_t, std::size_t> trained;
  std::map<std::int64_t, std::int64_t> last_version, first_version;  ///< by iteration, of its samples
  std::vector<IterationTimes> times;

  std::size_t num_samples() const override { return samples; }
  std::size_t num_optimizer_steps() const override { return steps; }
  bool needs_whole_batch() const override { return whole_batch; }
  bool overlap_pays() const override { return pays; }

  std::vector<FinishedSample> generate(std::int64_t last_iteration) override {
    enter(Task::kGenerate, last_iteration);
    for (; started_ <= last_iteration; ++started_)
      for (std::size_t i = 0; i < samples; ++i) pending_.push_back({started_, i});
    std::vector<FinishedSample> finished;
    const std::int64_t version = version_.load();
    for (std::size_t i = 0; i < pending_.size();) {
      const std::int64_t k = pending_[i].iteration;
      first_version.try_emplace(k, version);
      last_version[k] = version;
      if (random_.below(3) != 0) {
        ++i;
        continue;
      }
      finished.push_back(pending_[i]);
      pending_.erase(pending_.begin() + static_cast<std::ptrdiff_t>(i));
    }
    const std::lock_guard lock(mutex_);
    for (const FinishedSample& s : finished) {
      if (k_staleness(s.iteration, first_version[s.iteration]) > max_staleness)
        fail<Error>("iteration ", s.iteration, " sampled with version ", first_version[s.iteration]);
      finished_[s.iteration].insert(s.sample);
    }
    return finished;
  }
  void score(std::int64_t k, std::span<const SampleIndex> list) override {
    enter(Task::kScore, k);
    note("score", k, list);
    const std::lock_guard lock(mutex_);
    for (const SampleIndex i : list)
      if (!finished_[k].contains(i) || !scored_[k].insert(i).second) fail<Error>("bad score of ", i);
  }
  void compute_advantages(std::int64_t k, std::span<const SampleIndex> list) override {
    enter(Task::kAdvantage, k);
    note("advantage", k, list);
    for (const SampleIndex i : list)
      if (!scored_[k].contains(i) || !advantaged_[k].insert(i).second) fail<Error>("bad advantage of ", i);
  }
  // A micro-batch of the first step is ready for each share of the samples that has come.
  std::size_t num_micro_batches(std::int64_t k, std::size_t step) const override {
    const auto found = advantaged_.find(k);
    const std::size_t ready = found == advantaged_.end() ? 0 : found->second.size();
    return step > 0 || ready == samples ? micro_batches : ready * micro_batches / samples;
  }
  void train(std::int64_t k, std::size_t step, std::size_t i) override {
    enter(Task::kTrain, k);
    calls.push_back(concat("train ", k, " ", step, " ", i));
    ++trained[k];
  }
  void optimize(std::int64_t k, std::size_t step) override {
    enter(Task::kOptimize, k);
    const std::lock_guard lock(mutex_);
    if (finished_[k].size() != samples) fail<Error>("optimizer step of an incomplete batch");
    // On-policy, the weights must not change while they are read.
    if (max_staleness == 0 && generating_) fail<Error>("weights change during a decode step");
    calls.push_back(concat("optimize ", k, " ", step));
  }
  void finish(std::int64_t k, const IterationTimes& t) override {
    enter(Task::kFinish, k);
    calls.push_back(concat("finish ", k));
    times.push_back(t);
    if (pays_by_turns) pays = !pays;
  }
  void publish(std::int64_t k) override {
    enter(Task::kPublish, k);
    if (k != version_) fail<Error>("publish of ", k, " as version ", version_ + 1);
    ++version_;
    calls.push_back(concat("publish ", k));
  }
  void lanes_changed(bool generate_busy, bool) override { generating_ = generate_busy; }

  void start_at(std::int64_t first, std::int64_t version) {
    started_ = first;
    version_ = version;
  }
  std::int64_t version() const { return version_; }

 private:
  static std::int64_t k_staleness(std::int64_t k, std::int64_t version) { return k - version; }
  void enter(Task task, std::int64_t k) {
    if (before) before(task, k);
  }
  void note(const char* what, std::int64_t k, std::span<const SampleIndex> list) {
    std::string text = concat(what, " ", k, ":");
    for (const SampleIndex i : list) text += concat(" ", i);
    calls.push_back(text);
  }

  std::mutex mutex_;
  RandomStream random_{seed, 7};
  std::int64_t started_ = 0;
  std::atomic<std::int64_t> version_{0};
  std::atomic<bool> generating_{false};
  std::vector<FinishedSample> pending_;
  std::map<std::int64_t, std::set<SampleIndex>> finished_, scored_, advantaged_;
};

}  // namespace rlhf::schedule

// Every order in which two lanes can start and end their actions, for small runs: a model checker.
#include <map>
#include <optional>
#include <set>

#include "rlhf/schedule/policy.h"
#include "tests/catch.h"
#include "tests/schedule/fake_workload.h"

namespace rlhf::schedule {
namespace {

struct Shape {
  std::size_t samples, steps, micro_batches;
  bool whole_batch;
  std::int64_t iterations;
  bool pays = true;
};

// Explores all states that are reachable, with every choice of which samples a decode call returns.
class Explorer {
 public:
  Explorer(const Policy& policy, const Shape& shape) : policy_(policy), shape_(shape) {
    work_.samples = shape.samples;
    work_.steps = shape.steps;
    work_.whole_batch = shape.whole_batch;
    work_.pays = shape.pays;
  }

  void explore() { visit({Progress(work_, 0, shape_.iterations, 0), {}, {}}); }
  std::size_t num_states() const { return seen_.size(); }
  std::size_t num_ends() const { return ends_; }
  /// Whether a batch was worked on while its stragglers decoded, in any order of events.
  bool was_early() const { return early_; }

 private:
  struct State {
    Progress progress;
    std::array<std::optional<Action>, 2> running;
    std::map<std::int64_t, std::int64_t> version;  // that an iteration is sampled with
  };

  std::string key(const State& s) const {
    std::string text = concat(s.progress.generated(), " ", s.progress.trained(), " ", s.progress.published());
    const auto& now = s.progress.current();
    for (const SampleIndex i : now.arrived) text += concat(" a", i);
    text += concat(" ", now.num_scored, " ", now.num_advantaged, " ", now.step, " ", now.num_ready, " ",
                   now.num_trained);
    for (const auto& action : s.running)
      text += action ? concat(" ", to_string(action->task), action->iteration) : " -";
    for (const auto& [k, v] : s.version) text += concat(" ", k, ":", v);
    for (const auto& [k, list] : s.progress.arrived()) text += concat(" ", k, "=", list.size());
    return text;
  }

  void visit(State state) {
    // Idle lanes take what the policy gives them, either of them first.
    if (!seen_.insert(key(state)).second) return;
    bool moved = false;
    for (const Lane lane : kAllLanes) {
      auto& slot = state.running[static_cast<std::size_t>(lane)];
      if (slot) {
        moved = true;
        finish(state, lane);
        continue;
      }
      if (!policy_.overlaps() && (state.running[0] || state.running[1])) continue;
      const auto action = policy_.next(lane, state.progress);
      if (!action) continue;
      moved = true;
      REQUIRE(lane_of(action->task) == lane);
      REQUIRE_NOTHROW(state.progress.check(*action));
      State next = state;
      next.running[static_cast<std::size_t>(lane)] = action;
      check_start(next, *action);
      visit(std::move(next));
    }
    if (!moved) {
      INFO(policy_.name() << ": " << key(state));
      REQUIRE(state.progress.done());
      ++ends_;
    }
  }

  void check_start(State& state, const Action& action) {
    const std::int64_t published = state.progress.published();
    if (action.task == Task::kGenerate)
      for (std::int64_t k = state.progress.generated(); k <= action.iteration; ++k) {
        const auto [place, fresh] = state.version.try_emplace(k, published);
        REQUIRE(k - place->second <= policy_.max_staleness());
        if (!policy_.updates_in_flight()) REQUIRE(place->second == published);
      }
    const auto& generating = state.running[0];
    early_ |= generating && (action.task == Task::kScore || action.task == Task::kTrain);
    if (action.task == Task::kOptimize && policy_.max_staleness() == 0) REQUIRE_FALSE(generating);
    if (action.task == Task::kPublish && !policy_.updates_in_flight()) REQUIRE_FALSE(generating);
    if (action.task == Task::kOptimize) REQUIRE(published == action.iteration);
  }

  void finish(const State& state, Lane lane) {
    const Action action = *state.running[static_cast<std::size_t>(lane)];
    State next = state;
    next.running[static_cast<std::size_t>(lane)].reset();
    if (action.task != Task::kGenerate) {
      const auto& now = next.progress.current();
      std::size_t ready = 0;
      if (action.task == Task::kAdvantage) {
        const std::size_t n = now.num_advantaged + action.samples.size();
        ready = n == shape_.samples ? shape_.micro_batches : n * shape_.micro_batches / shape_.samples;
      }
      if (action.task == Task::kOptimize) ready = action.step + 1 < shape_.steps ? shape_.micro_batches : 0;
      next.progress.record(action, ready);
      return visit(std::move(next));
    }
    // Any subset of what is missing may have finished; in the order of the samples.
    std::vector<FinishedSample> missing;
    const auto arrived = next.progress.arrived();
    for (std::int64_t k = next.progress.generated(); k <= action.iteration; ++k)
      for (std::size_t i = 0; i < shape_.samples; ++i)
        if (!arrived.contains(k) || !arrived.at(k).contains(i)) missing.push_back({k, i});
    for (std::size_t bits = 1; bits < (std::size_t{1} << missing.size()); ++bits) {
      std::vector<FinishedSample> finished;
      for (std::size_t i = 0; i < missing.size(); ++i)
        if (bits >> i & 1) finished.push_back(missing[i]);
      State after = next;
      after.progress.record_samples(action, finished);
      visit(std::move(after));
    }
  }

  const Policy& policy_;
  Shape shape_;
  FakeWorkload work_;
  std::set<std::string> seen_;
  std::size_t ends_ = 0;
  bool early_ = false;
};

TEST_CASE("no order of events leads to a dead end, old weights or a broken graph") {
  std::vector<std::unique_ptr<Policy>> policies;
  policies.push_back(serial_policy());
  policies.push_back(streamed_policy());
  policies.push_back(one_step_off_policy());
  policies.push_back(async_policy(1));
  policies.push_back(async_policy(2));
  for (const auto& policy : policies)
    for (const Shape& shape : {Shape{1, 1, 1, false, 3}, Shape{2, 2, 2, false, 3}, Shape{3, 1, 2, false, 2},
                               Shape{2, 1, 2, true, 4}, Shape{2, 1, 0, false, 2}}) {
      INFO(policy->name() << " samples " << shape.samples << " whole batch " << shape.whole_batch);
      Explorer explorer(*policy, shape);
      explorer.explore();
      CHECK(explorer.num_ends() >= 1);
      CHECK(explorer.num_states() > 10);
    }
}

TEST_CASE("a streamed iteration in which overlapping does not pay is a serial one") {
  for (const bool pays : {false, true})
    for (const bool whole_batch : {false, true}) {
      INFO("pays " << pays << ", whole batch " << whole_batch);
      const auto policy = streamed_policy();
      Explorer explorer(*policy, Shape{3, 2, 2, whole_batch, 2, pays});
      explorer.explore();
      CHECK(explorer.num_ends() >= 1);
      CHECK(explorer.was_early() == pays);
    }
}

}  // namespace
}  // namespace rlhf::schedule

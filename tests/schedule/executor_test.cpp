// Policies under the real executor: the order of calls, times, random delays, failures.
#include <atomic>
#include <chrono>
#include <numeric>
#include <thread>

#include "rlhf/schedule/executor.h"
#include "tests/catch.h"
#include "tests/schedule/fake_workload.h"
#include "tests/schedule/policies.h"

namespace rlhf::schedule {
namespace {

void prepare(FakeWorkload& work, const Policy& policy) {
  work.max_staleness = policy.max_staleness();
  work.in_flight = policy.updates_in_flight();
}

void run_all(const Policy& policy, FakeWorkload& work, std::int64_t last) {
  ExecutorOptions options;
  options.last = last;
  run(policy, work, options);
}

TEST_CASE("serial runs phase after phase, and every second is accounted for") {
  FakeWorkload work;
  double now = 100;
  work.before = [&](Task task, std::int64_t) {
    now += task == Task::kGenerate ? 3 : task == Task::kTrain ? 4 : task == Task::kFinish ? 0 : 1;
  };
  std::vector<TraceEvent> events;
  ExecutorOptions options;
  options.last = 2;
  options.clock = [&] { return now; };
  options.sink = [&](const TraceEvent& event) { events.push_back(event); };
  run(*serial_policy(), work, options);
  REQUIRE(work.calls.size() == 2 * 10);
  const std::vector<std::string> rest(work.calls.begin() + 2, work.calls.begin() + 10);
  CHECK(rest == std::vector<std::string>{"train 0 0 0", "train 0 0 1", "optimize 0 0", "train 0 1 0",
                                         "train 0 1 1", "optimize 0 1", "finish 0", "publish 0"});
  REQUIRE(work.times.size() == 2);
  for (const IterationTimes& times : work.times) {
    CHECK(times.seconds(Task::kScore) == 1);
    CHECK(times.seconds(Task::kAdvantage) == 1);
    CHECK(times.seconds(Task::kTrain) == 16);
    CHECK(times.seconds(Task::kOptimize) == 2);
    CHECK(times.wall_s == std::accumulate(times.task_s.begin(), times.task_s.end(), 0.0));
    CHECK(times.waited(Lane::kGenerate) + times.waited(Lane::kTrain) == 0);
  }
  double traced = 0;
  for (const TraceEvent& event : events) {
    CHECK_FALSE(event.waiting);
    CHECK(event.end_s >= event.begin_s);
    traced += event.end_s - event.begin_s;
  }
  CHECK(traced == now - 100);
}

TEST_CASE("scoring and training begin before the batch is complete when streamed") {
  const auto runs_through = [](bool whole_batch) {
    FakeWorkload work;
    work.samples = 8;
    work.whole_batch = whole_batch;
    std::atomic<std::size_t> delivered{0};
    std::atomic<bool> scored{false}, trained{false};
    work.before = [&](Task task, std::int64_t) {
      if (task == Task::kScore) scored = true;
      if (task == Task::kTrain) trained = true;
      if (task != Task::kGenerate || delivered == 0) return;
      // Further samples finish only when the other lane has worked on those that are there; half of them make
      // a micro-batch.
      const auto& worked = whole_batch || delivered < 4 ? scored : trained;
      for (int ms = 0; ms < 10000 && !worked; ++ms) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    };
    ExecutorOptions options;
    options.last = 1;
    options.sink = [&](const TraceEvent& event) {
      if (!event.waiting && event.task == Task::kGenerate) delivered += event.num_samples;
    };
    run(*streamed_policy(), work, options);
    // The order of the train lane's calls shows it: scores of a part, and training before the last.
    std::size_t scores = 0, first_train = work.calls.size(), last_score = 0;
    for (std::size_t i = 0; i < work.calls.size(); ++i) {
      if (work.calls[i].starts_with("score")) {
        ++scores;
        last_score = i;
      }
      if (work.calls[i].starts_with("train")) first_train = std::min(first_train, i);
    }
    return std::pair(scores > 1, first_train < last_score);
  };
  CHECK(runs_through(false) == std::pair(true, true));
  CHECK(runs_through(true) == std::pair(true, false));
}

TEST_CASE("lanes whose overlap does not pay take turns on the caller's thread") {
  for (const bool pays : {false, true}) {
    FakeWorkload work;
    work.pays = pays;
    std::atomic<int> generated_elsewhere = 0, trained_elsewhere = 0;
    work.before = [&, caller = std::this_thread::get_id()](Task task, std::int64_t) {
      if (std::this_thread::get_id() != caller)
        ++(task == Task::kGenerate ? generated_elsewhere : trained_elsewhere);
    };
    run_all(*streamed_policy(), work, 3);
    CHECK((generated_elsewhere > 0) == pays);
    CHECK(trained_elsewhere == 0);
  }
}

TEST_CASE("every policy does the same work under random delays") {
  const auto count = [](const FakeWorkload& work, const std::string& what) {
    return std::ranges::count_if(work.calls, [&](const auto& call) { return call.starts_with(what); });
  };
  for (const auto& policy : all_policies())
    for (std::uint64_t seed = 1; seed <= 60; ++seed) {
      FakeWorkload work;
      prepare(work, *policy);
      RandomStream random(seed, 3);
      work.samples = 1 + random.below(6);
      work.steps = 1 + random.below(3);
      work.micro_batches = 1 + random.below(3);
      work.whole_batch = random.below(2) == 0;
      work.pays = random.below(3) != 0;
      work.pays_by_turns = random.below(2) == 0;
      const std::uint64_t pace = random.below(3);
      work.before = [&, pace](Task task, std::int64_t) {
        if (pace == 0) return;
        const auto hash = static_cast<std::uint64_t>(task) * 7 + seed;
        if (hash % 3 == pace) std::this_thread::sleep_for(std::chrono::microseconds(20 * (hash % 5)));
      };
      const std::int64_t last = 5;
      INFO(policy->name() << " seed " << seed);
      REQUIRE_NOTHROW(run_all(*policy, work, last));
      CHECK(work.version() == last);
      CHECK(count(work, "finish") == last);
      CHECK(count(work, "optimize") == last * static_cast<std::int64_t>(work.steps));
      for (std::int64_t k = 0; k < last; ++k) {
        CHECK(work.trained[k] == work.steps * work.micro_batches);
        CHECK(k - work.first_version[k] <= policy->max_staleness());
        if (!policy->updates_in_flight()) CHECK(work.first_version[k] == work.last_version[k]);
      }
    }
}

TEST_CASE("a failure in any task ends the run, and both lanes come to rest") {
  for (const auto& policy : all_policies())
    for (const Task failing : kAllTasks)
      for (std::int64_t iteration : {0, 2}) {
        FakeWorkload work;
        prepare(work, *policy);
        work.before = [&](Task task, std::int64_t k) {
          if (task == failing && k >= iteration) fail<Error>("no luck with ", to_string(task));
        };
        INFO(policy->name() << " " << to_string(failing));
        CHECK_THROWS_WITH(run_all(*policy, work, 4),
                          ContainsSubstring(concat("no luck with ", to_string(failing))));
        CHECK(work.version() <= 4);
      }
}

TEST_CASE("a run may begin in the middle") {
  for (const auto& policy : all_policies()) {
    FakeWorkload work;
    prepare(work, *policy);
    const bool lags = policy->max_staleness() > 0 && !policy->updates_in_flight();
    ExecutorOptions options;
    options.first = 3;
    options.published = lags ? 2 : 3;
    options.last = 6;
    work.start_at(3, options.published);
    run(*policy, work, options);
    CHECK(work.version() == 6);
    CHECK(work.trained.begin()->first == 3);
    CHECK(work.first_version[3] == options.published);
  }
}

TEST_CASE("a generator that breaks its contract is found out") {
  class Bad : public FakeWorkload {
   public:
    std::vector<std::vector<FinishedSample>> answers;
    std::vector<FinishedSample> generate(std::int64_t) override { return answers.at(round_++); }
    void score(std::int64_t, std::span<const SampleIndex>) override {}
    void compute_advantages(std::int64_t, std::span<const SampleIndex>) override {}

   private:
    std::size_t round_ = 0;
  };
  const auto check = [](std::vector<std::vector<FinishedSample>> answers, const char* message) {
    for (const auto& policy : all_policies()) {
      Bad work;
      work.answers = answers;
      CHECK_THROWS_WITH(run_all(*policy, work, 2), ContainsSubstring(message));
    }
  };
  check({{{0, 4}}}, "returned sample 4 of 4");
  check({{{0, 1}}, {{0, 1}}}, "sample 1 of iteration 0 twice");
  check({{{7, 1}}}, "a sample of iteration 7");
}

TEST_CASE("a policy that breaks the task graph or has nothing to do is an error") {
  class Broken : public Policy {
   public:
    std::optional<Action> action;
    bool two_lanes = false;
    std::string_view name() const override { return "broken"; }
    std::optional<Action> next(Lane lane, const Progress&) const override {
      return action && lane_of(action->task) == lane ? action : std::nullopt;
    }
    bool overlaps() const override { return two_lanes; }
    std::int64_t max_staleness() const override { return 0; }
    bool updates_in_flight() const override { return false; }
  };
  const auto check = [](std::optional<Action> action, const char* message) {
    for (const bool two_lanes : {false, true}) {
      Broken policy;
      policy.action = std::move(action);
      policy.two_lanes = two_lanes;
      FakeWorkload work;
      CHECK_THROWS_WITH(run_all(policy, work, 1), ContainsSubstring(message));
      action = policy.action;
    }
  };
  check({}, "leaves both lanes waiting");
  check(Action{Task::kScore, 0, {0}, 0, 0}, "score of 1 samples, 0 are ready");
  check(Action{Task::kAdvantage, 0, {0}, 0, 0}, "advantage of 1 samples, 0 are ready");
  check(Action{Task::kTrain, 0, {}, 0, 0}, "training step 0 micro-batch 0");
  check(Action{Task::kOptimize, 0, {}, 0, 0}, "optimizer step 0 with 0 of 4 samples ready");
  check(Action{Task::kFinish, 0, {}, 0, 0}, "finished after 0 of 2 optimizer steps");
  check(Action{Task::kPublish, 0, {}, 0, 0}, "publish of iteration 0");
  check(Action{Task::kGenerate, 5, {}, 0, 0}, "generate up to iteration 5");
  CHECK_THROWS_AS(async_policy(0), InvalidArgument);
}

}  // namespace
}  // namespace rlhf::schedule

#include <numeric>
#include <string>

#include "rlhf/core/error.h"
#include "rlhf/schedule/policy.h"
#include "tests/catch.h"

namespace rlhf::schedule {
namespace {

// Four samples that finish out of order, two optimizer steps of two and one micro-batches. Every call takes
// as many seconds of the fake clock as `cost` says.
class FakeTasks : public IterationTasks {
 public:
  double now = 100;
  std::vector<std::string> calls;
  std::vector<std::vector<SampleIndex>> finishing = {{2}, {0, 3}, {1}};

  Clock clock() {
    return [this] { return now; };
  }

  std::size_t num_samples() const override { return 4; }
  std::size_t num_optimizer_steps() const override { return 2; }
  std::size_t num_micro_batches(std::size_t step) const override { return step == 0 ? 2 : 1; }
  std::vector<SampleIndex> generate() override {
    note("generate", 3);
    return finishing.at(round_++);
  }
  void score(std::span<const SampleIndex> samples) override {
    std::string name = "score";
    for (const SampleIndex sample : samples) name += concat(" ", sample);
    note(name, 2);
  }
  void compute_advantages() override { note("advantage", 0.5); }
  void train(std::size_t step, std::size_t i) override { note(concat("train ", step, " ", i), 4); }
  void optimize(std::size_t step) override { note(concat("optimize ", step), 1); }
  void publish() override { note("publish", 0.25); }

 private:
  void note(const std::string& call, double cost) {
    calls.push_back(call);
    now += cost;
  }
  std::size_t round_ = 0;
};

TEST_CASE("serial runs phase after phase, and every second is accounted for") {
  FakeTasks tasks;
  SerialPolicy policy;
  std::vector<TraceEvent> events;
  const auto times = run_iteration(policy, tasks, 7, tasks.clock(),
                                   [&](const TraceEvent& event) { events.push_back(event); });
  CHECK(tasks.calls == std::vector<std::string>{"generate", "generate", "generate", "score 0 1 2 3",
                                                "advantage", "train 0 0", "train 0 1", "optimize 0",
                                                "train 1 0", "optimize 1", "publish"});
  CHECK(times.seconds(Task::kGenerate) == 9);
  CHECK(times.seconds(Task::kScore) == 2);
  CHECK(times.seconds(Task::kAdvantage) == 0.5);
  CHECK(times.seconds(Task::kTrain) == 12);
  CHECK(times.seconds(Task::kOptimize) == 2);
  CHECK(times.seconds(Task::kPublish) == 0.25);
  CHECK(times.wall_s == std::accumulate(times.task_s.begin(), times.task_s.end(), 0.0));
  REQUIRE(events.size() == tasks.calls.size());
  CHECK(events[1].task == Task::kGenerate);
  CHECK(events[1].iteration == 7);
  CHECK(events[1].begin_s == 103);
  CHECK(events[1].end_s == 106);
  CHECK(events[1].num_samples == 2);
  CHECK(std::string(to_string(events.back().task)) == "publish");
}

// Runs a list of calls and returns the error of the first that the graph does not allow.
template <class Run>
std::string error_of(FakeTasks& tasks, Run run) {
  Recorder recorder(tasks, 0, tasks.clock(), {});
  try {
    run(recorder);
  } catch (const InternalError& error) {
    return error.what();
  }
  return "no error";
}

TEST_CASE("orders that the task graph forbids stop at once") {
  const std::vector<SampleIndex> all = {0, 1, 2, 3}, first = {2};
  const auto generate_all = [](Recorder& r) {
    while (r.num_finished() < r.num_samples()) r.generate();
  };
  const auto check = [&](auto run, const char* message) {
    FakeTasks tasks;
    CHECK_THAT(error_of(tasks, run), ContainsSubstring(message));
  };
  check([&](Recorder& r) { r.score(first); }, "sample 2 is scored before it has finished");
  check(
      [&](Recorder& r) {
        r.generate();
        r.score(first);
        r.score(first);
      },
      "sample 2 is scored twice");
  check(
      [&](Recorder& r) {
        r.generate();
        r.score(first);
        r.compute_advantages();
      },
      "advantages with 1 of 4 samples scored");
  check(
      [&](Recorder& r) {
        generate_all(r);
        r.generate();
      },
      "after all 4 samples");
  check(
      [&](Recorder& r) {
        generate_all(r);
        r.score(all);
        r.train(0, 0);
      },
      "training before the advantages");
  const auto until_advantages = [&](Recorder& r) {
    generate_all(r);
    r.score(all);
    r.compute_advantages();
  };
  check(
      [&](Recorder& r) {
        until_advantages(r);
        r.compute_advantages();
      },
      "computed twice");
  check(
      [&](Recorder& r) {
        until_advantages(r);
        r.train(0, 1);
      },
      "expected step 0 micro-batch 0");
  check(
      [&](Recorder& r) {
        until_advantages(r);
        r.train(0, 0);
        r.optimize(0);
      },
      "optimizer step 0 with 1 micro-batches trained");
  check(
      [&](Recorder& r) {
        until_advantages(r);
        r.train(0, 0);
        r.train(0, 1);
        r.train(0, 2);
      },
      "has no micro-batch 2");
  check(
      [&](Recorder& r) {
        until_advantages(r);
        r.publish();
      },
      "publish after 0 of 2 optimizer steps");
  check(
      [&](Recorder& r) {
        until_advantages(r);
        r.finish();
      },
      "without publishing");
}

TEST_CASE("samples may be scored one by one as they finish") {
  FakeTasks tasks;
  Recorder recorder(tasks, 0, tasks.clock(), {});
  while (recorder.num_finished() < recorder.num_samples()) recorder.score(recorder.generate());
  recorder.compute_advantages();
  CHECK(tasks.calls == std::vector<std::string>{"generate", "score 2", "generate", "score 0 3", "generate",
                                                "score 1", "advantage"});
}

TEST_CASE("wrong answers of the generator are caught") {
  const auto check = [](std::vector<std::vector<SampleIndex>> finishing, const char* message) {
    FakeTasks tasks;
    tasks.finishing = std::move(finishing);
    SerialPolicy policy;
    CHECK_THROWS_WITH(run_iteration(policy, tasks, 0, tasks.clock(), {}), ContainsSubstring(message));
  };
  check({{}}, "returned no sample");
  check({{4}}, "returned sample 4 of 4");
  check({{1}, {1}}, "returned sample 1 twice");
}

TEST_CASE("an exception of a task passes through") {
  class Failing : public FakeTasks {
    void compute_advantages() override { fail<Error>("reward of prompt 3 is not finite"); }
  } tasks;
  SerialPolicy policy;
  CHECK_THROWS_WITH(run_iteration(policy, tasks, 0, tasks.clock(), {}), ContainsSubstring("prompt 3"));
}

}  // namespace
}  // namespace rlhf::schedule

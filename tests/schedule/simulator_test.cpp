// The simulator against times worked out by hand, the serial executor on a fake clock, and invariants.
#include "rlhf/schedule/simulator.h"

#include <functional>
#include <numeric>

#include "rlhf/config/reader.h"
#include "rlhf/core/error.h"
#include "rlhf/core/random.h"
#include "rlhf/schedule/executor.h"
#include "tests/catch.h"
#include "tests/schedule/policies.h"

namespace rlhf::schedule {
namespace {

// Responses of 10 tokens after prompts of 1; a decode step takes 1 s, scoring half a second and training a
// second a token.
CostModel plain_costs() {
  CostModel costs;
  costs.lengths = {1, 10, 0};
  costs.decode.step_s = 1;
  costs.score.token_s = 0.5;
  costs.train.token_s = 1;
  costs.train.optimize_s = 3;
  costs.train.finish_s = 2;
  costs.train.publish_s = 1;
  costs.sharing = {1, 1};
  return costs;
}

SimulatedRun plain_run(std::size_t prompts, std::int64_t max_sequences) {
  SimulatedRun run;
  run.iterations = 2;
  run.prompts = prompts;
  run.max_new_tokens = 100;
  run.engine.max_sequences = max_sequences;
  return run;
}

double waited(const Simulation& s, Wait wait) {
  return s.wait_s[static_cast<std::size_t>(wait)];
}

void check_times(const std::vector<double>& times_s, const std::vector<double>& expected_s) {
  REQUIRE(times_s.size() == expected_s.size());
  for (std::size_t i = 0; i < times_s.size(); ++i) CHECK(times_s[i] == Approx(expected_s[i]));
}

// ---- by hand ----

TEST_CASE("a serial iteration is the sum of its phases") {
  const Simulation s = simulate(*serial_policy(), plain_run(2, 2), plain_costs(), 1);
  // Decode 10, score 2 x 11 / 2, train 2 x 11, optimize 3; report and publishing count to the next iteration.
  check_times(s.iteration_s, {46, 49});
  CHECK(s.wall_s == Approx(46 + 49 + 3));
  CHECK(s.busy_s[0] == Approx(20));
  CHECK(s.busy_s[1] == Approx(2 * 39));
  CHECK(waited(s, Wait::kSamples) == Approx(20));
  CHECK(waited(s, Wait::kWeights) == Approx(39));  // nothing is left to decode after the second
  CHECK(s.idle_s == 0);
  CHECK(s.trained_tokens == 40);
}

TEST_CASE("epochs and mini-batches: every optimizer step trains its part") {
  SimulatedRun run = plain_run(2, 2);
  run.iterations = 1;
  run.epochs = 3;
  run.mini_batches = 2;
  const Simulation s = simulate(*serial_policy(), run, plain_costs(), 1);
  CHECK(s.iteration_s[0] == Approx(10 + 11 + 3 * 2 * (11 + 3)));
}

TEST_CASE("streamed hides the scoring of the first sample behind the decoding of the second") {
  CostModel costs = plain_costs();
  SimulatedRun run = plain_run(2, 1);  // one slot: samples come at 10 s and 20 s
  run.iterations = 1;
  const Simulation serial = simulate(*serial_policy(), run, costs, 1);
  CHECK(serial.iteration_s[0] == Approx(20 + 11 + 22 + 3));
  const Simulation streamed = simulate(*streamed_policy(), run, costs, 1);
  CHECK(streamed.iteration_s[0] == Approx(20 + 5.5 + 22 + 3));
  // Half the device each: nothing is won, nothing is lost.
  costs.sharing = {0.5, 0.5};
  CHECK(simulate(*streamed_policy(), run, costs, 1).iteration_s[0] == Approx(56));
  // Scoring at 0.25 would take 22 s and decodes at 0.8 in that time: the second sample is there after 10 /
  // 0.8 = 12.5 s, when 5.5 - 12.5 / 4 = 2.375 s of scoring are left, which then run alone.
  costs.sharing = {0.8, 0.25};
  CHECK(simulate(*streamed_policy(), run, costs, 1).iteration_s[0] ==
        Approx(10 + 12.5 + 2.375 + 5.5 + 22 + 3));
}

TEST_CASE("micro-batches of the first step are trained while later samples decode") {
  CostModel costs = plain_costs();
  costs.score.token_s = 0;
  SimulatedRun run = plain_run(8, 1);
  run.iterations = 1;
  run.max_tokens_per_micro_batch = 11;  // a sample each
  // Held back of 1 .. 8 samples that have come: 4 4 4 4 4 3 2 0. So training begins with the fifth, at 50 s,
  // and never runs out of micro-batches.
  CHECK(simulate(*streamed_policy(), run, costs, 1).iteration_s[0] == Approx(138 + 3));
  run.needs_whole_batch = true;
  CHECK(simulate(*streamed_policy(), run, costs, 1).iteration_s[0] == Approx(80 + 88 + 3));
}

TEST_CASE("one step off: the slower lane sets the pace") {
  CostModel costs = plain_costs();
  costs.train.finish_s = costs.train.publish_s = 0;
  SimulatedRun run = plain_run(2, 2);
  run.iterations = 4;
  const Simulation slow_train = simulate(*one_step_off_policy(), run, costs, 1);
  check_times(slow_train.iteration_s, {46, 36, 36, 36});
  CHECK(slow_train.tokens_by_staleness == std::vector<std::int64_t>{20, 60});
  costs.decode.step_s = 10;
  const Simulation slow_decode = simulate(*one_step_off_policy(), run, costs, 1);
  check_times(slow_decode.iteration_s, {136, 100, 100, 100});
  CHECK(waited(slow_decode, Wait::kWeights) == Approx(0));
}

TEST_CASE("devices wait for the slowest, then for the network") {
  CostModel costs = plain_costs();
  costs.lengths.sigma = 1;
  costs.network.gradient_bytes = 6e9;
  costs.network.devices_per_node = 2;
  costs.network.node_bytes_per_s = 1e9;
  costs.network.hop_s = 0.25;
  SimulatedRun run = plain_run(2, 2);
  run.iterations = 1;
  const auto alone_s = [&](std::size_t prompt) {
    const auto tokens = static_cast<double>(response_tokens(run, costs.lengths, 0, prompt, 0));
    return tokens + 1.5 * (tokens + 1);
  };
  const double a = alone_s(0), b = alone_s(1);
  REQUIRE(a != b);
  for (const auto& policy : all_policies()) {
    INFO(policy->name());
    const Simulation s = simulate(*policy, run, costs, 2);
    // 2 x (2 - 1) / 2 x 6 GB at 1 GB/s, and one hop.
    CHECK(s.iteration_s[0] == Approx(std::max(a, b) + 6.25 + 3));
    CHECK(waited(s, Wait::kSlowestRank) == Approx(std::abs(a - b)));
    CHECK(waited(s, Wait::kAllReduce) == Approx(2 * 6.25));
  }
  CHECK(costs.network.all_reduce_s(1) == 0);
  costs.network.cluster_bytes_per_s = 1e8;
  CHECK(costs.network.all_reduce_s(4) == Approx(1.5 * 60 + 2 * 0.25));
}

TEST_CASE("reward servers: the train lane waits, the device decodes on at full speed") {
  CostModel costs = plain_costs();
  costs.score = {};
  costs.score.latency_s = 4;
  costs.sharing = {0.5, 0.5};
  SimulatedRun run = plain_run(2, 1);
  run.iterations = 1;
  const Simulation s = simulate(*streamed_policy(), run, costs, 1);
  CHECK(s.iteration_s[0] == Approx(20 + 4 + 22 + 3));
  CHECK(waited(s, Wait::kReward) == Approx(8));
  CHECK(s.idle_s == Approx(4));
  costs.score.failure_probability = 0.5;
  costs.score.timeout_s = 100;
  run.iterations = 400;
  const Simulation failing = simulate(*serial_policy(), run, costs, 1);
  // Half of the calls fail: one time-out a call in the mean, standard deviation sqrt(2) / sqrt(400) of it.
  CHECK(waited(failing, Wait::kReward) / 400 == Approx(104).margin(4 * 100 * 0.071));
}

TEST_CASE("continuous batching: slots, prefill and the cost of a step") {
  DecodeCosts costs;
  costs.step_s = 1;
  costs.weights_s = 0.15;
  costs.sequence_s = 0.1;
  costs.context_token_s = 0.001;
  costs.prefill_token_s = 0.01;
  SECTION("two of three samples fit") {
    SimulatedEngine engine({2, 512}, costs);
    engine.submit({0, 0, 1, {2}});
    engine.submit({0, 1, 1, {4}});
    engine.submit({0, 2, 1, {1}});
    CHECK(engine.run(8) == 2);  // until the first is finished
    CHECK(engine.take_seconds() == Approx(2 * 1.2 + 0.001 * (2 + 4)));
    REQUIRE(engine.take_finished().size() == 1);
    CHECK(engine.run(8) == 1);  // the third takes its slot
    CHECK(engine.take_seconds() == Approx(1.2 + 0.001 * (3 + 1)));
    CHECK(engine.take_finished().at(0).sample == 2);
    CHECK(engine.run(8) == 1);  // one is left: reading the weights takes longer than its arithmetic
    CHECK(engine.take_seconds() == Approx(1.15 + 0.001 * 4));
    CHECK(engine.take_finished().at(0).sample == 1);
    CHECK_FALSE(engine.busy());
  }
  SECTION("a prompt is prefilled in chunks, up to its last token") {
    SimulatedEngine engine({4, 4}, costs);
    engine.submit({0, 0, 10, {1, 1}});
    for (const int chunk : {4, 4, 1}) {
      CHECK(engine.run(8) == 1);
      CHECK(engine.take_seconds() == Approx(1.15 + 0.01 * chunk));
    }
    CHECK(engine.run(8) == 1);
    CHECK(engine.take_seconds() == Approx(1.2 + 0.001 * 20));
    CHECK(engine.take_finished().size() == 2);
  }
  SECTION("tokens carry the version they are decoded with") {
    SimulatedEngine engine({4, 512}, costs);
    engine.submit({2, 0, 1, {5}});
    engine.run(3);
    engine.set_version(1);
    engine.run(8);
    CHECK(engine.tokens_by_staleness() == std::vector<std::int64_t>{0, 2, 3});
  }
}

TEST_CASE("lengths have the mean and the spread that were asked for, and stay within their limit") {
  SimulatedRun run = plain_run(1, 1);
  run.max_new_tokens = 1 << 20;
  const LengthModel lengths{1, 1000, 0.8};
  double sum = 0, logs = 0, squares = 0;
  constexpr int kDraws = 20000;
  for (int i = 0; i < kDraws; ++i) {
    const auto tokens = static_cast<double>(response_tokens(run, lengths, i, 3, 1));
    sum += tokens / kDraws;
    logs += std::log(tokens) / kDraws;
    squares += std::log(tokens) * std::log(tokens) / kDraws;
  }
  CHECK(sum == Approx(1000).epsilon(0.03));  // standard error 0.7 %
  CHECK(std::sqrt(squares - logs * logs) == Approx(0.8).epsilon(0.03));
  run.max_new_tokens = 50;
  for (int i = 0; i < 100; ++i) CHECK(response_tokens(run, lengths, i, 0, 0) <= 50);
}

// ---- the executor as oracle ----

// Lets the clock go on by what each call costs.
class Clocked : public Workload {
 public:
  Clocked(SimulatedWorkload& inner, double& now_s) : inner_(inner), now_s_(now_s) {}
  std::size_t num_samples() const override { return inner_.num_samples(); }
  std::size_t num_optimizer_steps() const override { return inner_.num_optimizer_steps(); }
  bool needs_whole_batch() const override { return inner_.needs_whole_batch(); }
  std::vector<FinishedSample> generate(std::int64_t last) override {
    auto finished = inner_.generate(last);
    now_s_ += inner_.cost(Lane::kGenerate).compute_s;
    return finished;
  }
  void score(std::int64_t k, std::span<const SampleIndex> s) override {
    after([&] { inner_.score(k, s); });
  }
  void compute_advantages(std::int64_t k, std::span<const SampleIndex> s) override {
    after([&] { inner_.compute_advantages(k, s); });
  }
  std::size_t num_micro_batches(std::int64_t k, std::size_t step) const override {
    return inner_.num_micro_batches(k, step);
  }
  void train(std::int64_t k, std::size_t step, std::size_t i) override {
    after([&] { inner_.train(k, step, i); });
  }
  void optimize(std::int64_t k, std::size_t step) override {
    after([&] { inner_.optimize(k, step); });
  }
  void finish(std::int64_t k, const IterationTimes& times) override {
    iteration_s.push_back(times.wall_s);
    after([&] { inner_.finish(k, times); });
  }
  void publish(std::int64_t k) override {
    after([&] { inner_.publish(k); });
  }
  std::vector<double> iteration_s;

 private:
  void after(const std::function<void()>& call) {
    call();
    const auto cost = inner_.cost(Lane::kTrain);
    now_s_ += cost.compute_s + cost.reward_s;
  }
  SimulatedWorkload& inner_;
  double& now_s_;
};

CostModel random_costs(RandomStream& random) {
  CostModel costs;
  const auto draw = [&] { return std::exp(2 * random.normal()) * 1e-3; };
  costs.lengths = {1 + 20 * random.uniform(), 1 + 30 * random.uniform(), 1.5 * random.uniform()};
  costs.decode = {draw(), draw(), draw(), draw() / 100, draw()};
  costs.score = {draw(), draw(), 10 * draw(), random.uniform() / 2, 10 * draw()};
  costs.train = {draw(), draw(), draw(), draw(), draw(), draw()};
  costs.sharing = {0.1 + 0.9 * random.uniform(), 0.1 + 0.9 * random.uniform()};
  costs.network.gradient_bytes = 1e8 * random.uniform();
  return costs;
}

SimulatedRun random_run(RandomStream& random) {
  SimulatedRun run;
  run.iterations = static_cast<std::int64_t>(1 + random.below(6));
  run.prompts = 4 + random.below(9);
  run.samples_per_prompt = 1 + random.below(4);
  run.epochs = 1 + random.below(3);
  run.mini_batches = 1 + random.below(4);
  run.max_tokens_per_micro_batch = 2 + random.below(200);
  run.needs_whole_batch = random.below(3) == 0;
  run.max_new_tokens = static_cast<std::int64_t>(1 + random.below(60));
  run.engine = {static_cast<std::int64_t>(1 + random.below(20)),
                static_cast<std::int64_t>(1 + random.below(40))};
  run.seed = random.next_u64();
  return run;
}

TEST_CASE("in serial mode the simulator gives what the executor measures on a fake clock") {
  RandomStream random(11);
  for (int round = 0; round < 30; ++round) {
    const CostModel costs = random_costs(random);
    const SimulatedRun run = random_run(random);
    SimulatedWorkload inner(run, costs, 0, 1);
    double now_s = 0;
    Clocked workload(inner, now_s);
    ExecutorOptions options;
    options.last = run.iterations;
    options.clock = [&] { return now_s; };
    schedule::run(*serial_policy(), workload, options);
    const Simulation s = simulate(*serial_policy(), run, costs, 1);
    check_times(s.iteration_s, workload.iteration_s);
  }
}

// ---- invariants ----

TEST_CASE("whatever things cost: every sample is trained once, no token is too old, no time is lost") {
  RandomStream random(12);
  for (int round = 0; round < 60; ++round) {
    const CostModel costs = random_costs(random);
    const SimulatedRun run = random_run(random);
    const std::size_t devices = 1 + random.below(4);
    std::int64_t tokens = 0;
    for (std::int64_t k = 0; k < run.iterations; ++k)
      for (std::size_t p = 0; p < run.prompts; ++p)
        for (std::size_t i = 0; i < run.samples_per_prompt; ++i)
          tokens += response_tokens(run, costs.lengths, k, p, i);
    for (const auto& policy : all_policies()) {
      INFO("round " << round << ", " << policy->name() << ", devices " << devices);
      const Simulation s = simulate(*policy, run, costs, devices);
      CHECK(s.trained_samples ==
            static_cast<std::size_t>(run.iterations) * run.prompts * run.samples_per_prompt);
      CHECK(s.trained_tokens == tokens);
      CHECK(std::accumulate(s.tokens_by_staleness.begin(), s.tokens_by_staleness.end(), std::int64_t{0}) ==
            tokens);
      CHECK(static_cast<std::int64_t>(s.tokens_by_staleness.size()) <= policy->max_staleness() + 1);
      REQUIRE(s.iteration_s.size() == static_cast<std::size_t>(run.iterations));
      // A device's train lane is busy or waits for something, at any time. Devices end together but for the
      // last report.
      double train_s = s.busy_s[1];
      for (const Wait wait : kAllWaits)
        if (lane_of(wait) == Lane::kTrain) train_s += waited(s, wait);
      CHECK(train_s == Approx(s.device_s()));
      CHECK(s.busy_s[0] <= s.device_s() * (1 + 1e-9));
    }
  }
}

TEST_CASE("without a loss in sharing, overlap is never slower than serial by more than the order of work") {
  RandomStream random(13);
  for (int round = 0; round < 30; ++round) {
    CostModel costs = random_costs(random);
    costs.sharing = {1, 1};
    costs.score.call_s = costs.score.latency_s = costs.score.failure_probability = 0;
    costs.train.advantage_s = costs.train.micro_batch_s = 0;  // more calls cost nothing
    costs.lengths.prompt_tokens = 1;
    SimulatedRun run = random_run(random);
    run.samples_per_prompt = 1;  // no prompt is split over micro-batches
    const double serial_s = simulate(*serial_policy(), run, costs, 2).wall_s;
    for (const auto& policy : all_policies()) {
      INFO("round " << round << ", " << policy->name());
      CHECK(simulate(*policy, run, costs, 2).wall_s <= serial_s * (1 + 1e-9));
    }
  }
}

TEST_CASE("equal inputs give equal simulations, and another seed other lengths") {
  RandomStream random(14);
  const CostModel costs = random_costs(random);
  SimulatedRun run = random_run(random);
  run.max_new_tokens = 1000;
  run.iterations = 3;
  const Simulation a = simulate(*async_policy(2), run, costs, 3);
  const Simulation b = simulate(*async_policy(2), run, costs, 3);
  CHECK(a.iteration_s == b.iteration_s);
  CHECK(a.tokens_by_staleness == b.tokens_by_staleness);
  // The same samples, however many devices share them.
  CHECK(simulate(*serial_policy(), run, costs, 1).trained_tokens == a.trained_tokens);
  ++run.seed;
  CHECK(simulate(*async_policy(2), run, costs, 3).trained_tokens != a.trained_tokens);
}

// ---- bad input ----

TEST_CASE("errors name keys and limits") {
  CHECK_THROWS_WITH(simulate(*serial_policy(), plain_run(2, 1), plain_costs(), 3),
                    ContainsSubstring("2 prompts a batch (ppo.algorithm.prompts_per_step) for 3 devices"));
  const auto problems = [](const std::string& text) {
    try {
      config::parse<CostModel>(text, "rates.yaml");
    } catch (const ConfigError& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  CHECK_THAT(problems("decode: {step_s: -1}"), ContainsSubstring("rates.yaml:1:18: decode.step_s: got -1"));
  CHECK_THAT(problems("decode: {steps_s: 1}"), ContainsSubstring("nearest key is decode.step_s"));
  CHECK_THAT(problems("sharing: {train: 0}"), ContainsSubstring("sharing.train: got 0"));
  CHECK_THAT(problems("score: {timeout_s: 3}"),
             ContainsSubstring("score.timeout_s") && ContainsSubstring("set failure_probability"));
  CHECK_THAT(problems("lengths: {sigma: .nan}"), ContainsSubstring("lengths.sigma"));
  CHECK_THROWS_WITH(quantile({}, 0.5), ContainsSubstring("of 0 values"));
  CHECK_THROWS_WITH(recommend({}), ContainsSubstring("no simulation"));
}

TEST_CASE(
    "quantiles, and the recommendation prefers fresh samples unless they cost more than the tolerance") {
  CHECK(quantile({3, 1, 2}, 0.5) == 2);
  CHECK(quantile({1, 2}, 0.5) == 1.5);
  CHECK(quantile({0, 10}, 0.9) == Approx(9));
  const auto with_speed = [](double seconds) {
    Simulation s;
    s.wall_s = seconds;
    s.trained_samples = 1;
    return s;
  };
  CHECK(recommend({with_speed(1.04), with_speed(1)}) == 0);
  CHECK(recommend({with_speed(1.5), with_speed(1.04), with_speed(1)}) == 1);
  CHECK(recommend({with_speed(2), with_speed(1.5), with_speed(1)}) == 2);
}

}  // namespace
}  // namespace rlhf::schedule

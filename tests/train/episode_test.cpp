// PPO with an environment: what it says is masked everywhere, what it gives is a reward, and runs repeat.
#include <chrono>
#include <thread>

#include "tests/catch.h"
#include "tests/train/tiny_run.h"

using namespace rlhf;

namespace {

// Interrupts after every "l", "e" or space; a turn is worth how many letters it has.
class Interrupter : public EnvironmentFactory {
 public:
  enum class Speed { kAtOnce, kSlow };
  explicit Interrupter(Speed speed) : speed_(speed) {}

  class Episode : public Environment {
   public:
    explicit Episode(Speed speed) : speed_(speed) {}
    Observation observe(const AssistantTurn& turn) override {
      if (speed_ == Speed::kSlow) std::this_thread::sleep_for(std::chrono::microseconds(300));
      Observation observation;
      observation.text = "<" + std::to_string(turn.number) + ">";
      observation.reward = static_cast<double>(turn.text.size());
      observation.tool_calls = 2;
      observation.tool_errors = 1;
      return observation;
    }

   private:
    Speed speed_;
  };

  std::unique_ptr<Environment> begin(const EpisodeStart&) const override {
    return std::make_unique<Episode>(speed_);
  }
  const std::vector<std::string>& turn_strings() const override { return strings_; }
  bool hears_stops() const override { return false; }
  bool answers_at_once() const override { return speed_ == Speed::kAtOnce; }

 private:
  Speed speed_;
  std::vector<std::string> strings_ = {"l", "e", " "};
};

using Steps = std::map<std::pair<std::string, std::int64_t>, Metrics>;

Steps train(const TinyData& data, std::shared_ptr<const EnvironmentFactory> environment,
            std::vector<std::string> overrides) {
  for (const char* more : {"stages=[sft, ppo]", "sft.max_steps=30", "rollout.max_new_tokens=24",
                           "rollout.environment.max_turns=4", "rewards=[{type: environment}]",
                           "ppo.reward_model_weight=0", "ppo.critic_init=policy"})
    overrides.emplace_back(more);
  Watcher watcher(nullptr);
  PipelineSettings settings;
  settings.environment.environment = std::move(environment);
  Pipeline pipeline(data.options("episodes", overrides), settings, watcher);
  pipeline.run();
  return watcher.steps;
}

}  // namespace

TEST_CASE("PPO trains on what the policy said, not on what the environment said") {
  const TinyData data;
  // The ratio is taken to the sampler's own log-probs, which are 0 where the environment spoke: one such
  // token in the loss, and the mean is not 1.
  const auto steps = train(
      data, std::make_shared<Interrupter>(Interrupter::Speed::kAtOnce),
      {"ppo.algorithm.epochs=1", "ppo.algorithm.mini_batches=1", "ppo.algorithm.correction.bypass=true"});
  for (std::int64_t i = 1; i <= 4; ++i) {
    const Metrics& metrics = steps.at({"ppo", i});
    const auto value = [&](const char* name) { return metric(metrics, name, -1); };
    INFO("iteration " << i);
    CHECK(value("episode/observation_fraction") > 0.1);
    CHECK(value("episode/observation_fraction") < 0.8);
    CHECK(value("episode/turns") > 1);
    CHECK(value("episode/turns") <= 4);
    CHECK(value("episode/tool_calls") == Approx(2 * value("episode/turns")));
    CHECK(value("episode/tool_errors") == Approx(0.5));
    CHECK(value("episode/environment_errors") == 0);
    CHECK(value("time/environment_s") >= 0);
    CHECK(value("policy/ratio_mean") == Approx(1).margin(1e-5));
    CHECK(value("policy/ratio_variance") == Approx(0).margin(1e-9));
    CHECK(value("rollout/logprob_gap_max") < 1e-5);
    CHECK(value("reward/environment") == Approx(value("episode/reward")));
    CHECK(value("reward/total") == Approx(value("episode/reward")));
    CHECK(value("train/gradient_norm") > 0);
  }
}

TEST_CASE("episodes train in every mode of the schedule, and slow environments change no sample") {
  const TinyData data;
  const auto at_once = train(data, std::make_shared<Interrupter>(Interrupter::Speed::kAtOnce), {});
  const auto again = train(data, std::make_shared<Interrupter>(Interrupter::Speed::kAtOnce), {});
  for (const auto& [key, metrics] : at_once)
    for (const auto& [name, value] : metrics)
      if (!measures_time(name)) CHECK(metric(again.at(key), name, -1) == value);
  for (const char* mode : {"serial", "streamed", "one_step_off", "async"}) {
    const auto slow = train(data, std::make_shared<Interrupter>(Interrupter::Speed::kSlow),
                            {std::string("schedule.mode=") + mode});
    INFO(mode);
    for (const char* name : {"episode/turns", "episode/reward", "rollout/mean_length"})
      CHECK(metric(slow.at({"ppo", 1}), name, -1) == metric(at_once.at({"ppo", 1}), name, -2));
    CHECK(metric(slow.at({"ppo", 4}), "episode/turns", 0) > 0);
  }
}

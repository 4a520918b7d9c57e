// Whole runs whose samples are drawn with weights in bf16 and int8.
#include <cmath>

#include "rlhf/core/error.h"
#include "tests/catch.h"
#include "tests/train/tiny_run.h"

using namespace rlhf;
using Start = PipelineSettings::Start;

namespace {

double at(const Attempt& run, std::int64_t step, const std::string& name) {
  return metric(run.steps.at({"ppo", step}), name, -99);
}

std::vector<std::string> messages_of(const RunOptions& options) {
  Watcher watcher(nullptr);
  Pipeline(options, {}, watcher).run();
  return watcher.messages;
}

bool mentions(const std::vector<std::string>& messages, const std::string& text) {
  return std::ranges::any_of(messages,
                             [&](const std::string& m) { return m.find(text) != std::string::npos; });
}

}  // namespace

TEST_CASE("rounded samples are corrected by truncated importance weights, and the mismatch is reported") {
  const TinyData data;
  int number = 0;
  for (const std::string weights : {"bf16", "int8"})
    for (const std::string mode : {"serial", "streamed", "one_step_off", "async"}) {
      INFO(weights << ", " << mode);
      const Attempt run =
          attempt(data.options("r" + std::to_string(number++),
                               {"rollout.weights=" + weights, "schedule.mode=" + mode, "threads=2"}),
                  Start::kFresh);
      for (std::int64_t step = 1; step <= 4; ++step) {
        CHECK(at(run, step, "time/pack_s") >= 0);
        CHECK(std::abs(at(run, step, "rollout_corr/rollout_is_mean") - 1) < 0.1);
        CHECK(at(run, step, "rollout_corr/rollout_is_max") <= 2);
        CHECK(at(run, step, "rollout_corr/k3_kl") >= 0);
      }
      // The first batch is drawn with the weights it is trained on: the gap is the rounding's.
      CHECK(at(run, 1, "rollout/logprob_gap_mean") > 0);
      CHECK(at(run, 1, "rollout/logprob_gap_mean") < 0.05);
      CHECK(at(run, 1, "rollout_corr/k3_kl") < 0.01);
    }
}

TEST_CASE("what corrects rounded samples can be chosen, and is said where it is not") {
  const TinyData data;
  const std::string notice = "rollout.weights is int8";
  CHECK(mentions(messages_of(data.options("a", {"rollout.weights=int8"})), notice));
  CHECK_FALSE(mentions(messages_of(data.options("b")), "rollout.weights"));
  const std::vector<std::string> ignored = {"rollout.weights=int8", "ppo.weight_mismatch=ignore"};
  CHECK_FALSE(mentions(messages_of(data.options("c", ignored)), notice));
  const Attempt run = attempt(data.options("d", ignored), Start::kFresh);
  CHECK(at(run, 1, "rollout_corr/rollout_is_mean") == -99);
  CHECK(at(run, 1, "rollout/logprob_gap_mean") > 0);
  // A correction of the user's own stays.
  const std::vector<std::string> own = {"rollout.weights=int8",
                                        "ppo.algorithm.correction.level=sequence_product",
                                        "ppo.algorithm.correction.mode=mask"};
  CHECK_FALSE(mentions(messages_of(data.options("e", own)), notice));
  CHECK(at(attempt(data.options("f", own), Start::kFresh), 1, "rollout_corr/rollout_is_oob_ratio") >= 0);
  // Evaluation reads the policy's own weights: before any PPO it is the same.
  const std::vector<std::string> judged = {"stages=[pretrain, sft, eval]"};
  auto rounded = judged;
  rounded.push_back("rollout.weights=int8");
  attempt(data.options("g", judged), Start::kFresh);
  attempt(data.options("h", rounded), Start::kFresh);
  CHECK(files_below(data.path("g") / "samples") == files_below(data.path("h") / "samples"));
}

TEST_CASE("other stages that sample take rounded weights as well") {
  const TinyData data;
  for (const std::string stage : {"rejection_sampling", "online_preference"}) {
    const std::vector<std::string> base = {"stages=[sft, " + stage + "]", "rollout.weights=int8"};
    INFO(stage);
    CHECK_FALSE(attempt(data.options(stage, base), Start::kFresh).steps.empty());
  }
}

TEST_CASE("bad values of rollout.weights and what it excludes are refused with the key") {
  const TinyData data;
  CHECK_THROWS_WITH(data.options("x", {"rollout.weights=int4"}),
                    ContainsSubstring("rollout.weights") && ContainsSubstring("int8"));
  CHECK_THROWS_WITH(
      data.options("x", {"rollout.weights=int8", "ppo.old_log_probs=rollout"}),
      ContainsSubstring("ppo.old_log_probs") && ContainsSubstring("needs rollout.weights: fp32"));
  CHECK_THROWS_WITH(data.options("x", {"ppo.weight_mismatch=clip"}),
                    ContainsSubstring("ppo.weight_mismatch") && ContainsSubstring("truncate"));
}

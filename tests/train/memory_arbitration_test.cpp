// The K/V cache and the training passes under one budget: nothing is ever above it, and nothing that is
// sampled or learned depends on it.
#include <cmath>
#include <thread>

#include "rlhf/core/error.h"
#include "rlhf/core/random.h"
#include "rlhf/memory/bytes_predictor.h"
#include "rlhf/train/build_task.h"
#include "rlhf/train/memory_plan.h"
#include "rlhf/train/ppo_memory.h"
#include "tests/catch.h"
#include "tests/train/tiny_run.h"

using namespace rlhf;
using Start = PipelineSettings::Start;

namespace {

// A cache that is large beside the passes: more sequences and longer responses than in the tiny run.
const std::vector<std::string> kLargeCache = {"rollout.max_sequences=10", "rollout.max_new_tokens=24",
                                              "ppo.algorithm.prompts_per_step=5", "threads=2",
                                              // No stage before ppo may need more than ppo itself.
                                              "pretrain.max_tokens_per_micro_batch=40"};
const std::vector<std::string> kByGroup = {"ppo.critic_init=policy",
                                           "ppo.algorithm.critic_update=none",
                                           "ppo.algorithm.advantage.form=sequence",
                                           "ppo.algorithm.advantage.group.baseline=mean",
                                           "ppo.algorithm.advantage.whitening=none",
                                           "ppo.algorithm.reward.placement=last_token",
                                           "ppo.algorithm.kl={placement: none}",
                                           "ppo.algorithm.value_positions=tokens"};

std::vector<std::string> with(std::vector<std::string> overrides, const std::vector<std::string>& more) {
  overrides.insert(overrides.end(), more.begin(), more.end());
  return overrides;
}

double sum_over_steps(const Attempt& run, const std::string& name) {
  double sum = 0;
  for (const auto& [key, metrics] : run.steps)
    if (key.first == "ppo") sum += metric(metrics, name, 0);
  return sum;
}

double largest_over_steps(const Attempt& run, const std::string& name) {
  double largest = 0;
  for (const auto& [key, metrics] : run.steps)
    if (key.first == "ppo") largest = std::max(largest, metric(metrics, name, 0));
  return largest;
}

// The least with which the run can do: what was measured with plenty, the cache at its minimum.
std::uint64_t tight_budget(const RunOptions& options, const Attempt& plenty) {
  double bytes = largest_over_steps(plenty, "memory/peak_bytes") -
                 largest_over_steps(plenty, "memory/peak_bytes/K/V cache");
  const LanguageModel policy = load_policy(options);
  const TaskData data = build_task(options, policy);
  const std::int64_t least = block_need(options.rollout, longest_prompt(data.train_prompts)).minimum;
  bytes += static_cast<double>(KvStore<float>::block_bytes(policy.config(), policy.config().num_layers) *
                               static_cast<std::size_t>(least));
  PlanSetting setting;
  setting.model = policy.config();
  setting.longest_prompt = std::max(longest_prompt(data.train_prompts), longest_prompt(data.eval_prompts));
  return std::max(static_cast<std::uint64_t>(bytes), plan_memory(options, setting).minimum_bytes());
}

std::string final_policy(const TinyData& data, const std::string& run) {
  return read_text_file(data.path(run) / "checkpoints" / "ppo.final.safetensors");
}

}  // namespace

TEST_CASE("under a tight budget the peak stays below it and the run is the same bit for bit") {
  const TinyData data;
  for (const bool by_group : {true, false}) {
    const auto variant = by_group ? with(kLargeCache, kByGroup) : kLargeCache;
    for (const std::string mode : {"serial", "streamed", "one_step_off"}) {
      const std::string name = mode + (by_group ? "-group" : "");
      INFO(name);
      const auto overrides = with(variant, {"schedule.mode=" + mode});
      const RunOptions options = data.options(name, overrides);
      const Attempt plenty = attempt(options, Start::kFresh);
      CHECK(sum_over_steps(plenty, "memory/cache_reclaims") == 0);
      const std::uint64_t budget = tight_budget(options, plenty);
      REQUIRE(static_cast<double>(budget) < largest_over_steps(plenty, "memory/peak_bytes"));
      const RunOptions tight_options =
          data.options(name + "-tight", with(overrides, {"memory.budget=" + std::to_string(budget)}));
      const Attempt tight = attempt(tight_options, Start::kFresh);
      CHECK(largest_over_steps(tight, "memory/peak_bytes") <= static_cast<double>(budget));
      // Cache, buffers and the gaps between them, beside weights and optimizer.
      CHECK(largest_over_steps(tight, "memory/arena_peak_bytes") < static_cast<double>(budget));
      CHECK(largest_over_steps(tight, "memory/arena_peak_bytes") > 0);
      CHECK(largest_over_steps(tight, "memory/prediction_overruns") == 0);
      CHECK(sum_over_steps(tight, "memory/cache_reclaims") > 0);
      CHECK((final_policy(data, name + "-tight") == final_policy(data, name)));
      CHECK(files_below(data.path(name + "-tight") / "samples") == files_below(data.path(name) / "samples"));
      for (const auto& [key, metrics] : plenty.steps)
        for (const auto& [metric_name, value] : metrics)
          if (!measures_time(metric_name) && metric_name != "rollout/decode_steps" && std::isfinite(value)) {
            INFO(key.first << " " << key.second << " " << metric_name);
            CHECK(metric(tight.steps.at(key), metric_name, -1e300) == value);
          }
    }
  }
}

TEST_CASE("a run that computes layers again is the same run, and its passes take less") {
  const TinyData data;
  const std::vector<std::string> every_stage = {"stages=[sft, reward, ppo, eval]"};
  const Attempt kept =
      attempt(data.options("kept", with(every_stage, {"memory.recompute=none"})), Start::kFresh);
  const Attempt again =
      attempt(data.options("again", with(every_stage, {"memory.recompute=layers"})), Start::kFresh);
  CHECK((final_policy(data, "again") == final_policy(data, "kept")));
  CHECK(files_below(data.path("again") / "samples") == files_below(data.path("kept") / "samples"));
  CHECK(largest_over_steps(again, "memory/peak_bytes/activations") <
        largest_over_steps(kept, "memory/peak_bytes/activations"));
  CHECK(largest_over_steps(again, "memory/prediction_overruns") == 0);
}

TEST_CASE("a pass that cannot fit is told with the key that would help") {
  const TinyData data;
  const RunOptions options = data.options("x");
  const LanguageModel policy = load_policy(options);
  const TaskData task = build_task(options, policy);
  ThreadPool pool(1);
  const Compute<float> compute(pool, kernels::detect_cpu_isa());
  const std::size_t slab = RolloutEngine::slab_bytes(policy.config(), compute, 0);
  const BlockNeed need = block_need(options.rollout, longest_prompt(task.train_prompts));
  PpoMemory::Setting setting;
  setting.least_blocks = 4;
  setting.fixed = {{"policy weights", 1000}};
  // Room for the pass alone, but not beside the weights.
  const PassShape shape = PassShape::at_most(1000, 3);
  const auto formula = static_cast<double>(SequencePass<float>::activation_bytes(policy.config(), shape, 2));
  setting.budget_bytes =
      500 + static_cast<std::uint64_t>(std::ceil(formula * (1 + BytesPredictor::kFirstMargin)));
  REQUIRE(setting.budget_bytes > 1000 + static_cast<std::uint64_t>(need.wanted) * slab);
  Arena arena;
  arena.open(setting.arena_bytes(std::uint64_t{1} << 40), slab);
  CHECK(arena.layout().capacity() == (setting.budget_bytes - 1000) / 64 * 64);
  SequencePass<float> pass(policy.config(), compute, Recompute::kNone, &arena);
  const auto engine =
      make_engine(policy, {options.rollout, task.train_prompts, compute, need.wanted, 0, &arena});
  PpoMemory memory(setting, policy.config(), *engine, pass, arena);
  CHECK_THROWS_WITH(
      memory.begin_pass(shape, 2),
      ContainsSubstring("a pass of 1000 tokens does not fit: lower max_tokens_per_micro_batch or "
                        "raise memory.budget") &&
          ContainsSubstring("policy weights"));
  // The cache has given all it could, and gets it back.
  CHECK(engine->cache().limit() == 4);
  {
    const auto turn = memory.step();
    memory.grow_cache();
  }
  CHECK(engine->cache().limit() == engine->cache().num_blocks());
  CHECK(memory.usage().used_bytes == 1000 + engine->kv_bytes());
  setting.budget_bytes = 2000;
  CHECK_THROWS_WITH(PpoMemory(setting, policy.config(), *engine, pass, arena),
                    ContainsSubstring("K/V cache needs"));
  Arena small;
  small.open(10 * slab, slab);
  CHECK_THROWS_WITH(
      make_engine(policy, {options.rollout, task.train_prompts, compute, need.wanted, 0, &small}),
      ContainsSubstring("rollout: no room for") && ContainsSubstring("K/V blocks"));
}

// The two lanes as fast as they can, with passes of random sizes: no order of events may block them, exceed
// the budget or change a sample.
TEST_CASE("both lanes go on under random demands, and the samples are those of a lane alone") {
  const TinyData data;
  const RunOptions options = data.options("x", {"rollout.max_sequences=8", "rollout.max_new_tokens=20"});
  const LanguageModel policy = load_policy(options);
  const TaskData task = build_task(options, policy);
  ThreadPool generate_pool(1), train_pool(1);
  const auto isa = kernels::detect_cpu_isa();
  const auto requests = [&](std::uint64_t seed) {
    std::vector<GenerationRequest> all;
    for (const Prompt& prompt : task.train_prompts) {
      all.push_back(make_request(prompt, options.rollout, policy, task));
      all.back().num_samples = 4;
      all.back().seed = seed;
    }
    return all;
  };
  for (std::uint64_t seed = 1; seed <= 10; ++seed) {
    INFO("seed " << seed);
    const BlockNeed need = block_need(options.rollout, longest_prompt(task.train_prompts));
    const auto make = [&](Arena* arena) {
      return make_engine(policy, {options.rollout, task.train_prompts, Compute<float>(generate_pool, isa),
                                  need.wanted, 0, arena});
    };
    const auto alone = generate_all(*make(nullptr), policy.parameters().weights(), 0, requests(seed));
    const PassShape largest = PassShape::at_most(60, 3);
    const std::size_t slab =
        RolloutEngine::slab_bytes(policy.config(), Compute<float>(generate_pool, isa), 0);
    PpoMemory::Setting setting;
    setting.least_blocks = need.minimum;
    setting.budget_bytes = std::max<std::uint64_t>(
        static_cast<std::uint64_t>(need.wanted) * slab,
        BytesPredictor().predict(SequencePass<float>::activation_bytes(policy.config(), largest, 0)) +
            setting.least_blocks * slab);
    Arena arena;
    arena.open(setting.arena_bytes(std::uint64_t{1} << 40), slab);
    const auto engine = make(&arena);
    SequencePass<float> pass(policy.config(), Compute<float>(train_pool, isa), Recompute::kNone, &arena);
    PpoMemory memory(setting, policy.config(), *engine, pass, arena);
    for (GenerationRequest& request : requests(seed)) engine->submit(std::move(request));
    std::vector<Sample> samples;
    std::thread generator([&] {
      while (true) {
        const auto turn = memory.step();
        if (!engine->busy()) return;
        memory.grow_cache();
        engine->step(policy.parameters().weights(), 0);
        while (auto sample = engine->try_take()) samples.push_back(std::move(*sample));
      }
    });
    RandomStream random(seed);
    for (int i = 0; i < 150; ++i) {
      const std::vector<TokenId> tokens(2 + random.below(58), static_cast<TokenId>(random.below(200)));
      const PackedRows rows({tokens});
      memory.set_training(true);
      {
        const auto lease = memory.begin_pass(PassShape::of(rows, 0), 0);
        pass.drop_trunk();
        pass.forward(policy.parameters().weights(), rows, SequencePass<float>::Keep::kNothing);
      }
      memory.set_training(false);
      if (random.below(3) == 0) std::this_thread::sleep_for(std::chrono::microseconds(random.below(300)));
    }
    generator.join();
    CHECK(memory.usage().peak_bytes <= setting.budget_bytes);
    CHECK(arena.layout().peak_bytes() <= setting.budget_bytes);
    CHECK(arena.layout().piece_bytes() >= pass.held_bytes());
    CHECK(memory.usage().tenants[1].peak_bytes >= pass.held_bytes());
    engine->scheduler().check();
    REQUIRE(samples.size() == alone.size());
    std::ranges::sort(samples, {}, [](const Sample& s) { return std::pair(s.prompt_id, s.sample_index); });
    std::vector<Sample> expected = alone;
    std::ranges::sort(expected, {}, [](const Sample& s) { return std::pair(s.prompt_id, s.sample_index); });
    for (std::size_t i = 0; i < samples.size(); ++i) {
      CHECK(samples[i].tokens == expected[i].tokens);
      CHECK(samples[i].logprobs == expected[i].logprobs);
    }
  }
}

// The plan against the bytes of real objects, and its advice against the plan.
#include "rlhf/train/memory_plan.h"

#include "rlhf/core/error.h"
#include "rlhf/train/build_task.h"
#include "rlhf/train/model_shape.h"
#include "rlhf/train/plan_advice.h"
#include "tests/catch.h"
#include "tests/train/tiny_run.h"

using namespace rlhf;
using Start = PipelineSettings::Start;

namespace {

constexpr std::uint64_t kGiB = std::uint64_t{1} << 30;

PlanSetting setting_of(const RunOptions& options) {
  const LanguageModel policy = load_policy(options);
  const TaskData data = build_task(options, policy);
  PlanSetting setting;
  setting.model = policy.config();
  setting.longest_prompt = std::max(longest_prompt(data.train_prompts), longest_prompt(data.eval_prompts));
  setting.machine_bytes = machine_memory_bytes();
  return setting;
}

RunOptions grpo(std::vector<std::string> overrides = {}) {
  config::LoadOptions load;
  load.overrides = std::move(overrides);
  return config::load<RunOptions>(RLHF_SOURCE_DIR "/configs/simulate/grpo_7b.yaml", load);
}

PlanSetting setting_of(const std::string& shape, std::int64_t devices, Sharding sharding) {
  PlanSetting setting;
  setting.model = shaped_model(shape).config;
  setting.longest_prompt = 512;
  setting.machine_bytes = 80 * kGiB;
  setting.sizes = NumberSizes::bf16();
  setting.devices = devices;
  setting.sharding = sharding;
  return setting;
}

const PlannedTenant* find(const MemoryPlan& plan, const std::string& name) {
  for (const PlannedTenant& tenant : plan.tenants)
    if (tenant.name == name) return &tenant;
  return nullptr;
}

}  // namespace

TEST_CASE("the plan's tenants are those of the run, byte for byte where they are fixed") {
  const TinyData data;
  const std::vector<std::vector<std::string>> variants = {
      {},
      {"model.trainable=last_layers", "model.last_layers=1"},
      {"model.trainable=lora", "model.lora_rank=2"},
      {"schedule.mode=one_step_off", "threads=2"},
      {"rollout.weights=int8", "model.trainable=last_layers", "model.last_layers=1"},
      {"rollout.weights=bf16", "schedule.mode=one_step_off", "threads=2"},
      {"stages=[sft, ppo]", "ppo.reward_model_weight=0", "ppo.critic_init=policy",
       "ppo.algorithm.critic_update=none", "ppo.algorithm.advantage.form=sequence",
       "ppo.algorithm.advantage.group.baseline=mean", "ppo.algorithm.reward.placement=last_token",
       "ppo.algorithm.value_positions=tokens", "ppo.algorithm.kl={placement: none}",
       "model.trainable=last_layers", "model.last_layers=1"}};
  int number = 0;
  for (const auto& variant : variants) {
    const RunOptions options = data.options("v" + std::to_string(number++), variant);
    INFO(options.run.dir);
    const MemoryPlan plan = plan_memory(options, setting_of(options));
    const Attempt run = attempt(options, Start::kFresh);
    std::set<std::string> measured;
    const std::string prefix = "memory/peak_bytes/";
    for (const auto& [name, value] : run.steps.at({"ppo", 4})) {
      if (!name.starts_with(prefix)) continue;
      const std::string tenant = name.substr(prefix.size());
      measured.insert(tenant);
      INFO(tenant);
      const PlannedTenant* planned = find(plan, tenant);
      REQUIRE(planned);
      if (tenant == kActivationsTenant) {
        // Sequences of this run are shorter than the plan takes them for, so their blocks are emptier.
        CHECK(value < 1.3 * static_cast<double>(planned->peak_bytes()));
        CHECK(value > 0.3 * static_cast<double>(planned->peak_bytes()));
      } else {
        CHECK(value == static_cast<double>(planned->peak_bytes()));
      }
    }
    for (const PlannedTenant& tenant : plan.tenants) CHECK(measured.contains(tenant.name));
    for (std::int64_t step = 1; step <= 4; ++step) {
      const Metrics& metrics = run.steps.at({"ppo", step});
      CHECK(std::abs(metric(metrics, "memory/prediction_error", 9)) < 0.15);
      CHECK(metric(metrics, "memory/prediction_overruns", 9) == 0);
      CHECK(metric(metrics, "memory/cache_reclaims", 9) == 0);  // a whole machine is enough
    }
  }
}

TEST_CASE("the formula of a pass is what its buffers take") {
  NewModelOptions shape;
  shape.layers = 3;
  shape.hidden_size = 32;
  shape.kv_heads = 2;
  shape.intermediate_size = 80;
  for (const auto& [last_layers, recompute] : {std::pair<std::int64_t, Recompute>{1, Recompute::kNone},
                                               {3, Recompute::kNone},
                                               {3, Recompute::kLayers}}) {
    TrainableOptions trainable;
    trainable.mode = TrainableMode::kLastLayers;
    trainable.last_layers = last_layers;
    LanguageModel model = LanguageModel::create(shape, trainable, 1);
    ThreadPool pool(1);
    SequencePass<float> pass(model.config(), Compute<float>(pool, kernels::detect_cpu_isa()), recompute);
    const std::int64_t first = model.parameters().weights().first_trainable_layer;
    for (const std::size_t length : {5, 64, 200, 310}) {
      const std::vector<TokenId> tokens(length, 7);
      const PackedRows rows({tokens, std::span<const TokenId>(tokens).first(length / 2)});
      std::vector<TokenTarget> targets;
      for (std::size_t t = 0; t + 1 < length; ++t)
        targets.push_back({rows.row(0, static_cast<std::int64_t>(t)), 7});
      const auto run = [&](bool trains) {
        pass.release();
        CHECK(pass.held_bytes() < 256 * 1024);  // the table of rotations stays
        const auto& weights = model.parameters().weights();
        pass.run_trunk(weights, rows, first);
        pass.forward(weights, rows,
                     trains ? SequencePass<float>::Keep::kForBackward : SequencePass<float>::Keep::kNothing);
        std::vector<float> logprobs(targets.size()), entropies(targets.size());
        pass.token_logprobs(weights, targets, 1, logprobs, entropies);
        if (trains) {
          pass.token_logprobs_backward(weights, targets, 1, logprobs, {});
          pass.backward(weights, rows);
        }
        const double formula = static_cast<double>(SequencePass<float>::activation_bytes(
            model.config(), PassShape::of(rows, targets.size()), trains ? last_layers : 0, recompute));
        INFO(length << " tokens, " << last_layers << " layers, trains " << trains << ", again "
                    << (recompute == Recompute::kLayers));
        CHECK(static_cast<double>(pass.held_bytes()) <= 1.02 * formula);
        CHECK(static_cast<double>(pass.held_bytes()) >= 0.8 * formula);
      };
      run(false);
      run(true);
    }
  }
}

TEST_CASE("an engine's workspace stays below its plan") {
  const TinyData data;
  for (const auto format : {WeightFormat::kFp32, WeightFormat::kInt8}) {
    RunOptions options = data.options("x");
    options.rollout.weights = format;
    const LanguageModel policy = load_policy(options);
    const TaskData task = build_task(options, policy);
    ThreadPool pool(1);
    const Compute<float> compute(pool, kernels::detect_cpu_isa());
    const auto engine = make_engine(policy, {options.rollout, task.train_prompts, compute});
    std::vector<GenerationRequest> requests;
    for (const Prompt& prompt : task.train_prompts)
      requests.push_back(make_request(prompt, options.rollout, policy, task));
    const DecoderWeights<float>& weights = policy.parameters().weights();
    std::optional<RolloutWeights> packed;
    if (format != WeightFormat::kFp32) packed.emplace(format, weights, weights, compute);
    generate_all(*engine, packed ? packed->weights() : weights, 0, std::move(requests));
    const std::uint64_t planned = generator_workspace_bytes(policy.config(), options.rollout, sizeof(float),
                                                            longest_prompt(task.train_prompts));
    CHECK(engine->workspace_bytes() <= planned);
    CHECK(engine->workspace_bytes() > planned / 3);
  }
}

TEST_CASE("what is counted without a model is what a model has") {
  const TinyData data;
  for (const std::vector<std::string>& variant : {std::vector<std::string>{},
                                                  {"model.trainable=last_layers", "model.last_layers=1"},
                                                  {"model.trainable=lora"}}) {
    const RunOptions options = data.options("x", variant);
    const LanguageModel model = load_policy(options);
    const ParameterCounts counts = count_parameters(model.config(), options.model.trainable);
    CHECK(static_cast<std::size_t>(counts.total) * 4 == model.parameters().owned_bytes());
    CHECK(static_cast<std::size_t>(counts.trainable) == model.parameters().trainable().size());
    CHECK(counts.first_trainable_layer == model.parameters().weights().first_trainable_layer);
  }
}

TEST_CASE("7e9 parameters: by hand") {
  // 18 bytes a parameter: bf16 weights, fp32 gradient, master weights, two moments; 2 for the reference, none
  // for a critic.
  const RunOptions options = grpo();
  const PlanSetting setting = setting_of("7.6e9,28,3584,512", 1, Sharding::kNone);
  const MemoryPlan plan = plan_memory(options, setting);
  const double parameters = 7.6e9;
  const auto bytes = [&](const char* name) { return static_cast<double>(find(plan, name)->peak_bytes()); };
  CHECK(bytes("policy weights") == Approx(2 * parameters).epsilon(0.001));
  CHECK(bytes("policy gradient") == Approx(4 * parameters).epsilon(0.001));
  CHECK(bytes("policy optimizer") == Approx(12 * parameters).epsilon(0.001));
  CHECK(bytes("reference (own part)") == Approx(2 * parameters).epsilon(0.001));
  // 65 sequences of 512 + 8192 tokens in 545 blocks of 16; 2 x 28 x 512 numbers of 2 bytes a token.
  CHECK(bytes("K/V cache") == 65.0 * 545 * 16 * 2 * 28 * 512 * 2);
  CHECK_FALSE(plan.fits(72 * kGiB));
  // ZeRO-1 over 8: an eighth of the optimizer's 12 bytes.
  const MemoryPlan sharded = plan_memory(options, setting_of("7.6e9,28,3584,512", 8, Sharding::kOptimizer));
  CHECK(static_cast<double>(find(sharded, "policy optimizer")->peak_bytes()) ==
        Approx(1.5 * parameters).epsilon(0.001));
  CHECK(find(sharded, "policy weights")->peak_bytes() == find(plan, "policy weights")->peak_bytes());
  CHECK(find(sharded, "policy gradient")->peak_bytes() == find(plan, "policy gradient")->peak_bytes());
  // ZeRO-2: an eighth of the gradient, and buffers of a layer and of what is in none.
  const MemoryPlan sliced = plan_memory(options, setting_of("7.6e9,28,3584,512", 8, Sharding::kGradients));
  const ModelConfig& model = setting.model;
  const double rest =
      static_cast<double>(((model.tied_embeddings ? 1 : 2) * model.vocab_size + 1) * model.hidden_size);
  CHECK(static_cast<double>(find(sliced, "policy gradient")->peak_bytes()) ==
        Approx(4 * (parameters / 8 + (parameters - rest) / 28 + rest)).epsilon(0.001));
  CHECK(find(sliced, "policy optimizer")->peak_bytes() == find(sharded, "policy optimizer")->peak_bytes());
}

TEST_CASE("a plan knows K and V in fp8, and advises it on a GPU where it helps") {
  const RunOptions options = grpo({"memory.recompute=none"}),
                   fp8 = grpo({"memory.recompute=none", "rollout.kv_dtype=fp8"});
  const PlanSetting setting = setting_of("7.6e9,28,3584,512", 1, Sharding::kNone);
  REQUIRE(setting.model.head_dim == 128);
  const MemoryPlan plan = plan_memory(options, setting), rounded = plan_memory(fp8, setting);
  // 65 sequences of 545 blocks; K and V of 16 tokens, 28 layers and 4 heads: 128 bytes and a scale.
  const std::uint64_t block = 16 * 2 * 28 * 4 * (128 + 1);
  CHECK(find(rounded, "K/V cache")->peak_bytes() == 65 * 545 * block);
  CHECK(find(rounded, "K/V cache")->need(Phase::kTrain).minimum == 545 * block);
  for (const PlannedTenant& tenant : plan.tenants)
    if (tenant.name != kKvCacheTenant) CHECK(find(rounded, tenant.name)->peak_bytes() == tenant.peak_bytes());
  const std::uint64_t budget = 200 * kGiB;
  CHECK(blocks_under(fp8, setting, plan.minimum_bytes()) > 545);
  CHECK(blocks_under(fp8, setting, budget) == 65 * 545);
  // Evaluation does not round: its least must fit.
  RunOptions judged = fp8;
  judged.stages.push_back("eval");
  CHECK(find(plan_memory(judged, setting), "K/V cache")->need(Phase::kGenerate).minimum ==
        546 * std::uint64_t{16 * 2 * 28 * 512 * 2});
  const auto advises = [&](const PlanSetting& where, std::uint64_t bytes) {
    const auto advice = advise(options, where, bytes);
    return std::ranges::any_of(advice, [](const Advice& way) {
      return way.changes == decltype(way.changes){{"rollout.kv_dtype", "fp8"}};
    });
  };
  REQUIRE(rounded.minimum_bytes() < plan.minimum_bytes());
  CHECK(advises(setting, rounded.minimum_bytes()));
  PlanSetting on_host = setting;
  on_host.sizes = NumberSizes::fp32();
  CHECK_FALSE(advises(on_host, plan_memory(options, on_host).minimum_bytes() - 1));
  // Reading them is predicted to take half of the time, and the scales.
  const auto& device = schedule::find_accelerator("h100-80g");
  const auto token_s = [&](KvFormat kv) {
    return schedule::roofline_costs(device, model_shape(setting.model, kv), {}).decode.context_token_s;
  };
  CHECK(token_s(KvFormat::kFp8) == Approx(token_s(KvFormat::kAuto) * 129 / 256));
}

TEST_CASE("advice fits, and the largest values it names are the largest") {
  struct Case {
    std::string shape;
    std::int64_t devices;
    Sharding sharding;
  };
  for (const Case& c :
       {Case{"7.6e9,28,3584,512", 1, Sharding::kNone}, Case{"7.6e9,28,3584,512", 8, Sharding::kOptimizer},
        Case{"70.6e9,80,8192,1024", 8, Sharding::kOptimizer}}) {
    INFO(c.shape << " on " << c.devices);
    const RunOptions options = grpo();
    const PlanSetting setting = setting_of(c.shape, c.devices, c.sharding);
    const std::uint64_t budget = 72 * kGiB;
    REQUIRE_FALSE(plan_memory(options, setting).fits(budget));
    const auto advice = advise(options, setting, budget);
    REQUIRE_FALSE(advice.empty());
    for (const Advice& way : advice) {
      INFO(to_string(way));
      CHECK(way.minimum_bytes <= budget);
      // The same changes by way of the configuration reader.
      const auto fits = [&](std::int64_t more_tokens) {
        std::vector<std::string> overrides;
        PlanSetting changed = setting;
        for (const auto& [key, value] : way.changes) {
          if (key == "--devices") changed.devices = std::stoll(value);
          if (key == "--shard")
            for (const Sharding s : {Sharding::kOptimizer, Sharding::kGradients, Sharding::kWeights})
              if (value == to_string(s)) changed.sharding = s;
          if (key == "distributed.sharding" && value == "zero2") changed.sharding = Sharding::kGradients;
          const bool tokens = key.ends_with("max_tokens_per_micro_batch");
          if (!key.starts_with("--"))
            overrides.push_back(key + "=" +
                                (tokens ? std::to_string(std::stoll(value) + more_tokens) : value));
        }
        return plan_memory(with_recompute_chosen(grpo(overrides), changed, budget), changed).fits(budget);
      };
      CHECK(fits(0));
      if (way.changes.back().first.ends_with("max_tokens_per_micro_batch") &&
          std::stoll(way.changes.back().second) > 512 + 8192)
        CHECK_FALSE(fits(1));
    }
  }
}

TEST_CASE("layers are computed again only where the budget asks for it") {
  const RunOptions options = grpo();
  const PlanSetting setting = setting_of("7.6e9,28,3584,512", 8, Sharding::kWeights);
  const auto least = [&](RecomputeChoice choice) {
    RunOptions chosen = options;
    chosen.memory.recompute = choice;
    return plan_memory(chosen, setting).minimum_bytes();
  };
  const std::uint64_t none = least(RecomputeChoice::kNone), layers = least(RecomputeChoice::kLayers);
  REQUIRE(layers < none);
  const auto chosen = [&](std::uint64_t budget, RecomputeChoice from) {
    RunOptions run = options;
    run.memory.recompute = from;
    return with_recompute_chosen(run, setting, budget).memory.recompute;
  };
  CHECK(chosen(none, RecomputeChoice::kAuto) == RecomputeChoice::kNone);
  CHECK(chosen(none - 1, RecomputeChoice::kAuto) == RecomputeChoice::kLayers);
  CHECK(chosen(layers - 1, RecomputeChoice::kAuto) == RecomputeChoice::kLayers);
  CHECK(chosen(none - 1, RecomputeChoice::kNone) == RecomputeChoice::kNone);
  // Who has excluded it is told that it would help.
  RunOptions excluded = options;
  excluded.memory.recompute = RecomputeChoice::kNone;
  const auto advice = advise(excluded, setting, layers);
  CHECK(std::ranges::any_of(advice, [](const Advice& way) {
    return way.changes == decltype(way.changes){{"memory.recompute", "layers"}};
  }));
}

TEST_CASE("batch limits are the last values that fit") {
  const RunOptions options = grpo({"ppo.max_tokens_per_micro_batch=9000", "model.trainable=lora"});
  const PlanSetting setting = setting_of("7.6e9,28,3584,512", 1, Sharding::kNone);
  const std::uint64_t budget = 72 * kGiB;
  const BatchLimits limits = batch_limits(options, setting, budget);
  REQUIRE(limits.micro_batch_tokens);
  RunOptions changed = options;
  changed.ppo.max_tokens_per_micro_batch = *limits.micro_batch_tokens;
  CHECK(plan_memory(changed, setting).fits(budget));
  ++changed.ppo.max_tokens_per_micro_batch;
  CHECK_FALSE(plan_memory(changed, setting).fits(budget));

  const auto cache_is_whole = [&](std::int64_t sequences) {
    RunOptions o = options;
    o.rollout.max_sequences = sequences;
    const MemoryPlan plan = plan_memory(o, setting);
    const auto held = plan.held(Phase::kGenerate, budget);
    for (std::size_t i = 0; i < held.size(); ++i)
      if (plan.tenants[i].name == kKvCacheTenant) return held[i] == plan.tenants[i].peak_bytes();
    return false;
  };
  CHECK(cache_is_whole(limits.max_sequences));
  CHECK_FALSE(cache_is_whole(limits.max_sequences + 1));
  CHECK(limits.sequence_bytes == std::uint64_t{545} * 16 * 2 * 28 * 512 * 2);
}

TEST_CASE("what is held is never more than the budget, and all that is wanted when there is room") {
  const TinyData data;
  const RunOptions options = data.options("x");
  const MemoryPlan plan = plan_memory(options, setting_of(options));
  CHECK(plan.minimum_bytes() < plan.wanted_bytes());
  for (const std::uint64_t budget : {plan.minimum_bytes(), (plan.minimum_bytes() + plan.wanted_bytes()) / 2,
                                     plan.wanted_bytes(), 2 * kGiB})
    for (const Phase phase : kAllPhases) {
      const auto held = plan.held(phase, budget);
      std::uint64_t total = 0;
      for (std::size_t i = 0; i < held.size(); ++i) {
        CHECK(held[i] >= plan.tenants[i].need(phase).minimum);
        if (budget >= plan.wanted_bytes()) CHECK(held[i] == plan.tenants[i].need(phase).wanted);
        total += held[i];
      }
      CHECK(total <= budget);
    }
}

TEST_CASE("a shape that cannot be is refused") {
  CHECK_THROWS_WITH(shaped_model("135e6,30,576,192"),
                    ContainsSubstring("give the model's directory instead"));
  CHECK_THROWS_WITH(shaped_model("7e9,x"), ContainsSubstring("--model-shape: got '7e9,x'"));
  const ModelConfig llama = shaped_model("70.6e9,80,8192,1024").config;
  CHECK(llama.intermediate_size == Approx(28672).epsilon(0.005));  // Llama 3 70B
  CHECK(static_cast<double>(count_parameters(llama)) == Approx(70.6e9).epsilon(0.001));
}

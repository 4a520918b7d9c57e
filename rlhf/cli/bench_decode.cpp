#include <iostream>
#include <nlohmann/json.hpp>

#include "rlhf/cli/bench.h"
#include "rlhf/cli/model_arguments.h"
#include "rlhf/core/error.h"
#include "rlhf/train/stage.h"
#include "rollout/engine/rollout_engine.h"

namespace rlhf::cli {
namespace {

struct BenchDecodeArguments : BenchModelArguments {
  std::int64_t batch = 1, context = 64, new_tokens = 64;
  WeightFormat weights = WeightFormat::kFp32;
  KvFormat kv = KvFormat::kAuto;
};

// Of the matrices that a step reads once, whatever the batch.
std::uint64_t weight_bytes(WeightFormat format, const DecoderWeights<float>& weights) {
  if (format != WeightFormat::kFp32) return RolloutWeights::bytes(format, weights.config);
  std::int64_t elements = weights.head.N * weights.head.K;
  for (const LayerWeights<float>& layer : weights.layers)
    for (const auto* w : {&layer.qkv, &layer.out, &layer.gate_up, &layer.down}) elements += w->N * w->K;
  return static_cast<std::uint64_t>(elements) * sizeof(float);
}

// Sampling at temperature 1 with end tokens ignored: fixed lengths.
void bench_decode(const BenchDecodeArguments& arguments) {
  LoadedModel loaded(arguments.model, arguments.threads, arguments.device);
  const ModelConfig& config = loaded.model.config();
  RLHF_CHECK(arguments.context + arguments.new_tokens <= config.max_positions, arguments.model,
             ": --context ", arguments.context, " and --new-tokens ", arguments.new_tokens,
             " exceed the model's context of ", config.max_positions);
  check_kv_dtype(arguments.kv, loaded);
  const Stopwatch packing;
  const GenerationWeights weights(arguments.weights, loaded);
  const double pack_seconds = packing.seconds();
  std::vector<double> decode, total;
  double decode_flops = 0, steps = 0;
  for (std::int64_t r = 0; r < arguments.repetitions; ++r) {
    RolloutEngineOptions options;
    options.max_sequences = arguments.batch;
    options.kv = arguments.kv;
    options.num_blocks =
        RolloutEngine::blocks_for(arguments.batch + 1, arguments.context + arguments.new_tokens);
    RolloutEngine engine(config, loaded.compute, options, {});
    for (std::int64_t b = 0; b < arguments.batch; ++b) {
      GenerationRequest request;
      request.prompt_id = static_cast<PromptId>(b);
      request.prompt = random_tokens(arguments.context, config.vocab_size, static_cast<std::uint64_t>(b) + 1);
      request.stop.max_new_tokens = arguments.new_tokens;
      engine.submit(std::move(request));
    }
    Stopwatch watch;
    double tokens = 0, seconds = 0;
    while (engine.busy()) {
      const auto before = engine.statistics();
      engine.step(weights.get(), 0);
      const auto after = engine.statistics();
      // Before and after them some sequences still have prompts, or have ended: that is a smaller batch.
      if (after.decode_only_tokens - before.decode_only_tokens != arguments.batch) continue;
      tokens += static_cast<double>(arguments.batch);
      seconds += after.decode_only_seconds - before.decode_only_seconds;
      decode_flops += after.matmul_flops - before.matmul_flops;
      ++steps;
    }
    total.push_back(static_cast<double>(engine.statistics().decode_tokens) / watch.seconds());
    if (seconds > 0) decode.push_back(tokens / seconds);
  }
  nlohmann::ordered_json out = {
      {"bench", "decode"},
      {"model", arguments.model},
      {"batch", arguments.batch},
      {"context", arguments.context},
      {"new_tokens", arguments.new_tokens},
      {"weights", loaded.compute.accelerator() ? "bf16" : to_string(arguments.weights)},
      {"kv_dtype", to_string(arguments.kv)},
      {"tokens_per_s", median(total)}};
  auto step_bytes = static_cast<double>(weight_bytes(arguments.weights, weights.get()));
  if (loaded.compute.accelerator()) step_bytes /= 2;  // bf16
  out["weights_mb"] = step_bytes / 1e6;
  if (arguments.weights != WeightFormat::kFp32) out["pack_s"] = pack_seconds;
  if (!decode.empty()) out["decode_tokens_per_s"] = median(decode);
  add_machine(out, loaded.compute);
  if (!decode.empty())
    add_rates(out, {static_cast<double>(arguments.batch) / median(decode), decode_flops / steps, step_bytes},
              loaded.compute);
  std::cout << out.dump() << "\n";
}

}  // namespace

void add_bench_decode(CLI::App& bench) {
  auto* verb = bench.add_subcommand(
      "decode",
      "Generation at a fixed batch size: tokens_per_s with prefill, decode_tokens_per_s of the steps in "
      "which the whole batch decodes");
  auto a = std::make_shared<BenchDecodeArguments>();
  add_bench_model_options(*verb, *a);
  add_weights_option(*verb, a->weights);
  add_kv_dtype_option(*verb, a->kv);
  verb->add_option("--batch", a->batch, "Sequences that decode at once")->check(CLI::Range(1, 4096));
  verb->add_option("--context", a->context, "Prompt tokens")->check(CLI::Range(1, 1 << 20));
  verb->add_option("--new-tokens", a->new_tokens, "Response tokens")->check(CLI::Range(1, 1 << 20));
  verb->callback([a] { bench_decode(*a); });
}

}  // namespace rlhf::cli

#include <algorithm>
#include <iostream>
#include <nlohmann/json.hpp>

#include "rlhf/cli/bench.h"
#include "rlhf/cli/model_arguments.h"
#include "rlhf/cli/work_package.h"
#include "rlhf/core/error.h"
#include "rlhf/train/generation.h"
#include "rlhf/train/stage.h"
#include "rollout/engine/rollout_engine.h"

namespace rlhf::cli {
namespace {

struct BenchRolloutArguments : WorkArguments {
  std::int64_t requests = 64, batch = 32, group_size = 1, repetitions = 5;
  WeightFormat weights = WeightFormat::kFp32;
  KvFormat kv = KvFormat::kAuto;
  int threads = 0;
  Device device = Device::kAuto;
};

GenerationRequest request_of(const WorkPackage& work, const BenchRolloutArguments& arguments,
                             std::uint64_t slot) {
  const Prompt& prompt = work.prompt(slot / static_cast<std::uint64_t>(arguments.group_size));
  GenerationRequest request;
  request.prompt_id = prompt.id;
  request.first_sample_index =
      static_cast<std::uint32_t>(slot) % static_cast<std::uint32_t>(arguments.group_size);
  request.prompt = prompt.tokens;
  work.fix_length(slot, arguments.length_mode(), arguments.response_tokens, request.stop);
  return request;
}

// Responses of a work package through as many slots as decode at once.
void bench_rollout(const BenchRolloutArguments& arguments) {
  const WorkPackage work = load_work_package(arguments.work);
  const LoadedModel loaded((work.folder / "policy").string(), arguments.threads, arguments.device);
  const ModelConfig& config = loaded.model.config();
  check_fits(work, config, arguments.response_tokens);
  check_kv_dtype(arguments.kv, loaded);
  const GenerationWeights weights(arguments.weights, loaded);
  double tokens = 0;
  for (std::int64_t slot = 0; slot < arguments.requests; ++slot)
    tokens += static_cast<double>(work.response_tokens(static_cast<std::uint64_t>(slot),
                                                       arguments.length_mode(), arguments.response_tokens));
  std::vector<double> total, decode;
  for (std::int64_t r = 0; r < arguments.repetitions; ++r) {
    RolloutEngineOptions options;
    options.max_sequences = arguments.batch;
    options.kv = arguments.kv;
    options.num_blocks = RolloutEngine::blocks_for(arguments.batch + 1,
                                                   longest_prompt(work.prompts) + arguments.response_tokens);
    RolloutEngine engine(config, loaded.compute, options, {});
    const Stopwatch watch;
    for (std::int64_t slot = 0; slot < arguments.requests; ++slot)
      engine.submit(request_of(work, arguments, static_cast<std::uint64_t>(slot)));
    while (engine.busy()) engine.step(weights.get(), 0);
    total.push_back(tokens / watch.seconds());
    const auto& statistics = engine.statistics();
    if (statistics.decode_only_seconds > 0)
      decode.push_back(static_cast<double>(statistics.decode_only_tokens) / statistics.decode_only_seconds);
  }
  nlohmann::ordered_json out = {{"bench", "rollout"},
                                {"work", work.folder.string()},
                                {"variant", work.variant},
                                {"mode", arguments.mode},
                                {"response_tokens", arguments.response_tokens},
                                {"requests", arguments.requests},
                                {"group_size", arguments.group_size},
                                {"batch", arguments.batch},
                                {"weights", to_string(arguments.weights)},
                                {"kv_dtype", to_string(arguments.kv)},
                                {"tokens", tokens},
                                {"tokens_per_s", median(total)}};
  if (!decode.empty()) out["decode_tokens_per_s"] = median(decode);
  add_machine(out, loaded.compute);
  std::cout << out.dump() << "\n";
}

}  // namespace

void add_bench_rollout(CLI::App& bench) {
  auto* verb = bench.add_subcommand(
      "rollout", "Responses of a work package's lengths to its prompts (see benchmarks/README.md)");
  auto a = std::make_shared<BenchRolloutArguments>();
  add_work_options(*verb, *a)->required();
  verb->add_option("--requests", a->requests, "Responses")->check(CLI::Range(1, 1 << 20));
  verb->add_option("--group-size", a->group_size, "Responses to a prompt")->check(CLI::Range(1, 4096));
  verb->add_option("--batch", a->batch, "Responses that decode at once")->check(CLI::Range(1, 4096));
  verb->add_option("--repetitions", a->repetitions, "Runs the median is taken of")
      ->check(CLI::Range(1, 1000));
  verb->add_option("--threads", a->threads, "0 = one per core")->check(CLI::Range(0, 1024));
  add_device_option(*verb, a->device);
  add_weights_option(*verb, a->weights);
  add_kv_dtype_option(*verb, a->kv);
  verb->callback([a] { bench_rollout(*a); });
}

}  // namespace rlhf::cli

#include "rlhf/cli/bench.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "rlhf/cli/model_arguments.h"
#include "rlhf/cli/verbs.h"
#include "rlhf/core/random.h"
#include "rlhf/kernels/accelerator.h"
#include "rlhf/kernels/machine_rates.h"
#include "rlhf/train/stage.h"

namespace rlhf::cli {

double median(std::vector<double> values) {
  std::ranges::sort(values);
  const std::size_t middle = values.size() / 2;
  return values.size() % 2 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

void add_rates(nlohmann::ordered_json& out, const BenchRates& rates, const Compute<float>& compute) {
  const double peak_flops = product_flops_per_s(compute);
  out["gflop_per_s"] = rates.flops / rates.seconds / 1e9;
  out["machine_gflop_per_s"] = peak_flops / 1e9;
  out["flop_share"] = rates.flops / rates.seconds / peak_flops;
  if (rates.weight_bytes == 0) return;
  const double peak_bytes = read_bytes_per_s(compute);
  out["weights_gb_per_s"] = rates.weight_bytes / rates.seconds / 1e9;
  out["machine_gb_per_s"] = peak_bytes / 1e9;
  out["bandwidth_share"] = rates.weight_bytes / rates.seconds / peak_bytes;
}

void add_machine(nlohmann::ordered_json& out, const Compute<float>& compute) {
  out["version"] = RLHF_VERSION;
  if (compute.accelerator()) out["device"] = compute.accelerator()->name;
  out["cpu_isa"] = compute.table().isa;
  out["threads"] = compute.pool().num_threads();
  out["peak_rss_mb"] = static_cast<double>(peak_resident_bytes()) / 1e6;
}

std::vector<TokenId> random_tokens(std::int64_t count, std::int64_t vocab_size, std::uint64_t seed) {
  RandomStream random(seed);
  std::vector<TokenId> tokens;
  for (std::int64_t i = 0; i < count; ++i)
    tokens.push_back(static_cast<TokenId>(random.below(static_cast<std::uint64_t>(vocab_size))));
  return tokens;
}

void add_bench_model_options(CLI::App& bench, BenchModelArguments& arguments) {
  bench.add_option("--model", arguments.model, "Hugging Face directory or GGUF file")->required();
  bench.add_option("--threads", arguments.threads, "0 = one per core")->check(CLI::Range(0, 1024));
  bench.add_option("--repetitions", arguments.repetitions, "Runs the median is taken of")
      ->check(CLI::Range(1, 1000));
  add_device_option(bench, arguments.device);
}

void add_bench(CLI::App& app) {
  auto* verb = app.add_subcommand("bench", "Measure: one JSON object per call, medians of repetitions");
  verb->require_subcommand(1);
  add_bench_decode(*verb);
  add_bench_train(*verb);
  add_bench_rollout(*verb);
  add_bench_pipeline(*verb);
}

}  // namespace rlhf::cli

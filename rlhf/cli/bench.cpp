#include "rlhf/cli/bench.h"

#include <algorithm>
#include <atomic>
#include <nlohmann/json.hpp>
#include <numeric>

#include "rlhf/cli/verbs.h"
#include "rlhf/core/random.h"
#include "rlhf/tensor/buffer.h"
#include "rlhf/train/stage.h"

namespace rlhf::cli {

double median(std::vector<double> values) {
  std::ranges::sort(values);
  const std::size_t middle = values.size() / 2;
  return values.size() % 2 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

double read_gb_per_s(const Compute<float>& compute) {
  constexpr std::int64_t kCount = std::int64_t{1} << 25, kPiece = std::int64_t{1} << 17;
  constexpr int kPasses = 8, kSums = 16;
  Buffer<std::uint64_t> memory(static_cast<std::size_t>(kCount));
  // Untouched memory is all one page of zeros.
  compute.pool().parallel_for(kCount, kPiece, [&](std::int64_t begin, std::int64_t end) {
    std::fill(memory.data() + begin, memory.data() + end, std::uint64_t{1});
  });
  std::atomic<std::uint64_t> total{0};  // keeps the reads
  double best = 0;
  for (int pass = 0; pass < kPasses; ++pass) {
    const Stopwatch watch;
    compute.pool().parallel_for(kCount, kPiece, [&](std::int64_t begin, std::int64_t end) {
      std::uint64_t sums[kSums] = {};
      for (const std::uint64_t* at = memory.data() + begin; at < memory.data() + end; at += kSums)
        for (int i = 0; i < kSums; ++i) sums[i] += at[i];
      total += std::accumulate(sums, sums + kSums, std::uint64_t{0});
    });
    best = std::max(best, static_cast<double>(memory.bytes()) / watch.seconds() / 1e9);
  }
  return total == 0 ? best : 0;
}

void add_machine(nlohmann::ordered_json& out, const Compute<float>& compute) {
  out["version"] = RLHF_VERSION;
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

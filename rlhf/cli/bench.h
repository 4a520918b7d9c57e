#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "rlhf/core/ids.h"
#include "rlhf/kernels/open_device.h"
#include "rlhf/kernels/ops.h"

namespace rlhf::cli {

/// Each adds one measurement to `rlhf bench`.
void add_bench_decode(CLI::App& bench);
void add_bench_train(CLI::App& bench);
void add_bench_rollout(CLI::App& bench);
void add_bench_pipeline(CLI::App& bench);

/// What the benches on a single model have in common.
struct BenchModelArguments {
  std::string model;
  std::int64_t repetitions = 5;
  int threads = 0;
  Device device = Device::kAuto;
};
void add_bench_model_options(CLI::App& bench, BenchModelArguments& arguments);

/// The middle value; the mean of the two middle ones when their number is even.
double median(std::vector<double> values);
/// What a measured piece of work has done.
struct BenchRates {
  double seconds = 0;
  double flops = 0;         ///< of matrix products and attention
  double weight_bytes = 0;  ///< of weights that were read; 0 = not a question of memory
};
/// Appends the rates, and their shares of what this machine's products and memory reach at best. After
/// add_machine: measuring memory takes 256 MiB.
void add_rates(nlohmann::ordered_json& out, const BenchRates& rates, const Compute<float>& compute);
/// Appends version, instruction set, threads and the process's peak memory.
void add_machine(nlohmann::ordered_json& out, const Compute<float>& compute);
/// Uniform token ids.
std::vector<TokenId> random_tokens(std::int64_t count, std::int64_t vocab_size, std::uint64_t seed);

}  // namespace rlhf::cli

#include <algorithm>
#include <iostream>
#include <nlohmann/json.hpp>

#include "rlhf/cli/bench.h"
#include "rlhf/cli/work_package.h"
#include "rlhf/core/error.h"
#include "rlhf/model/sequence_pass.h"
#include "rlhf/train/language_model.h"
#include "rlhf/train/optimizer.h"
#include "rlhf/train/stage.h"

namespace rlhf::cli {
namespace {

struct BenchTrainArguments : BenchModelArguments, WorkArguments {
  std::int64_t tokens = 1024, sequence = 128, rows = 16;
  bool recompute = false;
};

/// What is trained on: the loss is that of the tokens from loss_begin on.
struct TrainedSequences {
  std::vector<std::vector<TokenId>> tokens;
  std::vector<std::int64_t> loss_begin;
};

TrainedSequences random_sequences(const BenchTrainArguments& arguments, const ModelConfig& config) {
  const std::int64_t length = std::min(arguments.sequence, arguments.tokens);
  RLHF_CHECK(length <= config.max_positions, arguments.model, ": --sequence ", length,
             " exceeds the model's context of ", config.max_positions);
  TrainedSequences out;
  for (std::int64_t used = 0; used + length <= arguments.tokens; used += length) {
    out.tokens.push_back(random_tokens(length, config.vocab_size, static_cast<std::uint64_t>(used) + 1));
    out.loss_begin.push_back(1);
  }
  return out;
}

// Prompts of the package and random responses of its lengths; the loss is that of the responses.
TrainedSequences work_sequences(const BenchTrainArguments& arguments, const ModelConfig& config) {
  const WorkPackage work = load_work_package(arguments.work);
  check_fits(work, config, arguments.response_tokens);
  TrainedSequences out;
  for (std::uint64_t slot = 0; slot < static_cast<std::uint64_t>(arguments.rows); ++slot) {
    std::vector<TokenId> tokens = work.prompt(slot).tokens;
    out.loss_begin.push_back(static_cast<std::int64_t>(tokens.size()));
    const auto response =
        random_tokens(work.response_tokens(slot, arguments.length_mode(), arguments.response_tokens),
                      config.vocab_size, slot + 1);
    tokens.insert(tokens.end(), response.begin(), response.end());
    out.tokens.push_back(std::move(tokens));
  }
  return out;
}

// One optimizer step on packed sequences.
void bench_train(const BenchTrainArguments& arguments) {
  ThreadPool pool(arguments.threads);
  const OpenDevice device(arguments.device);
  const Compute<float> compute(pool, kernels::detect_cpu_isa(), device.accelerator());
  LanguageModel model = LanguageModel::load(arguments.model, {});
  if (device.accelerator()) model.parameters().place_on(*device.accelerator());
  const ModelConfig& config = model.config();
  const TrainedSequences trained =
      arguments.work.empty() ? random_sequences(arguments, config) : work_sequences(arguments, config);
  const auto& sequences = trained.tokens;
  const PackedRows rows({sequences.begin(), sequences.end()});
  std::vector<TokenTarget> targets;
  double tokens = 0;
  for (std::size_t s = 0; s < sequences.size(); ++s) {
    const auto length = static_cast<std::int64_t>(sequences[s].size());
    tokens += static_cast<double>(length);
    for (std::int64_t t = trained.loss_begin[s]; t < length; ++t)
      targets.push_back({rows.row(s, t - 1), sequences[s][static_cast<std::size_t>(t)]});
  }
  std::vector<float> logprobs(targets.size()),
      gradient(targets.size(), -1.0f / static_cast<float>(targets.size()));
  SequencePass<float> pass(config, compute, arguments.recompute ? Recompute::kLayers : Recompute::kNone);
  Optimizer<float> optimizer({}, model.parameters().num_trainable());
  std::vector<double> step, forward, backward, update;
  double flops = 0;
  for (std::int64_t r = 0; r <= arguments.repetitions; ++r) {
    const double flops_before = pass.matmul_flops();
    Stopwatch watch;
    pass.forward(model.parameters().weights(), rows, SequencePass<float>::Keep::kForBackward);
    pass.token_logprobs(model.parameters().weights(), targets, 1, logprobs, {});
    const double f = watch.lap();
    pass.token_logprobs_backward(model.parameters().weights(), targets, 1, gradient, {});
    pass.backward(model.parameters().weights(), rows);
    if (device.accelerator()) device.accelerator()->memory->synchronize();
    const double b = watch.lap();
    flops = pass.matmul_flops() - flops_before;
    optimizer.step(compute, model.parameters(), 1e-6);
    if (device.accelerator()) device.accelerator()->memory->synchronize();
    const double u = watch.lap();
    if (r == 0) continue;  // page faults of the first pass
    forward.push_back(f);
    backward.push_back(b);
    update.push_back(u);
    step.push_back(f + b + u);
  }
  nlohmann::ordered_json out = {{"bench", "train"},
                                {"model", arguments.model},
                                {"sequences", sequences.size()},
                                {"tokens", tokens},
                                {"rows", rows.rows().size()},
                                {"targets", targets.size()},
                                {"recompute", arguments.recompute},
                                {"weights", device.accelerator() ? "bf16" : "fp32"},
                                {"tokens_per_s", tokens / median(step)},
                                {"forward_s", median(forward)},
                                {"backward_s", median(backward)},
                                {"optimizer_s", median(update)}};
  if (!arguments.work.empty()) {
    out["work"] = arguments.work;
    out["mode"] = arguments.mode;
  }
  add_machine(out, compute);
  add_rates(out, {median(step), flops, 0}, compute);
  std::cout << out.dump() << "\n";
}

}  // namespace

void add_bench_train(CLI::App& bench) {
  auto* verb = bench.add_subcommand("train", "One training step on packed sequences");
  auto a = std::make_shared<BenchTrainArguments>();
  add_bench_model_options(*verb, *a);
  verb->add_option("--tokens", a->tokens, "Tokens of the step")->check(CLI::Range(2, 1 << 24));
  verb->add_option("--sequence", a->sequence, "Tokens of one sequence")->check(CLI::Range(2, 1 << 20));
  add_work_options(*verb, *a);
  verb->add_option("--rows", a->rows, "Responses of the work package in a step")->check(CLI::Range(1, 4096));
  verb->add_flag("--recompute", a->recompute, "Keep the inputs of layers only, and compute the rest again");
  verb->callback([a] { bench_train(*a); });
}

}  // namespace rlhf::cli

#include <algorithm>
#include <iostream>
#include <nlohmann/json.hpp>

#include "rlhf/cli/bench.h"
#include "rlhf/core/error.h"
#include "rlhf/model/sequence_pass.h"
#include "rlhf/train/language_model.h"
#include "rlhf/train/optimizer.h"
#include "rlhf/train/stage.h"

namespace rlhf::cli {
namespace {

struct BenchTrainArguments : BenchModelArguments {
  std::int64_t tokens = 1024, sequence = 128;
  bool recompute = false;
};

// One optimizer step on packed sequences with the loss on every token.
void bench_train(const BenchTrainArguments& arguments) {
  ThreadPool pool(arguments.threads);
  const Compute<float> compute(pool, kernels::detect_cpu_isa());
  LanguageModel model = LanguageModel::load(arguments.model, {});
  const ModelConfig& config = model.config();
  const std::int64_t length = std::min(arguments.sequence, arguments.tokens);
  RLHF_CHECK(length <= config.max_positions, arguments.model, ": --sequence ", length,
             " exceeds the model's context of ", config.max_positions);
  std::vector<std::vector<TokenId>> sequences;
  for (std::int64_t used = 0; used + length <= arguments.tokens; used += length)
    sequences.push_back(random_tokens(length, config.vocab_size, static_cast<std::uint64_t>(used) + 1));
  const PackedRows rows({sequences.begin(), sequences.end()});
  std::vector<TokenTarget> targets;
  for (std::size_t s = 0; s < sequences.size(); ++s)
    for (std::int64_t t = 1; t < length; ++t)
      targets.push_back({rows.row(s, t - 1), sequences[s][static_cast<std::size_t>(t)]});
  std::vector<float> logprobs(targets.size()),
      gradient(targets.size(), -1.0f / static_cast<float>(targets.size()));
  SequencePass<float> pass(config, compute, arguments.recompute ? Recompute::kLayers : Recompute::kNone);
  Optimizer<float> optimizer({}, model.parameters().trainable().size());
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
    const double b = watch.lap();
    flops = pass.matmul_flops() - flops_before;
    optimizer.step(compute, model.parameters(), 1e-6);
    const double u = watch.lap();
    if (r == 0) continue;  // page faults of the first pass
    forward.push_back(f);
    backward.push_back(b);
    update.push_back(u);
    step.push_back(f + b + u);
  }
  const double tokens = static_cast<double>(rows.rows().size());
  nlohmann::ordered_json out = {{"bench", "train"},
                                {"model", arguments.model},
                                {"tokens", rows.rows().size()},
                                {"sequence", length},
                                {"recompute", arguments.recompute},
                                {"weights", "fp32"},
                                {"tokens_per_s", tokens / median(step)},
                                {"forward_s", median(forward)},
                                {"backward_s", median(backward)},
                                {"optimizer_s", median(update)}};
  add_rates(out, {median(step), flops, 0}, compute);
  add_machine(out, compute);
  std::cout << out.dump() << "\n";
}

}  // namespace

void add_bench_train(CLI::App& bench) {
  auto* verb = bench.add_subcommand("train", "One training step on packed sequences");
  auto a = std::make_shared<BenchTrainArguments>();
  add_bench_model_options(*verb, *a);
  verb->add_option("--tokens", a->tokens, "Tokens of the step")->check(CLI::Range(2, 1 << 24));
  verb->add_option("--sequence", a->sequence, "Tokens of one sequence")->check(CLI::Range(2, 1 << 20));
  verb->add_flag("--recompute", a->recompute, "Keep the inputs of layers only, and compute the rest again");
  verb->callback([a] { bench_train(*a); });
}

}  // namespace rlhf::cli

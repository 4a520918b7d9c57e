#include <algorithm>
#include <chrono>
#include <iostream>
#include <nlohmann/json.hpp>

#include "rlhf/cli/model_arguments.h"
#include "rlhf/cli/verbs.h"
#include "rlhf/core/random.h"
#include "rlhf/model/sequence_pass.h"
#include "rlhf/train/optimizer.h"
#include "rlhf/train/stage.h"
#include "rollout/engine/rollout_engine.h"

namespace rlhf::cli {
namespace {

struct Arguments {
  std::string model;
  std::int64_t batch = 1, context = 64, new_tokens = 64, tokens = 1024, sequence = 128, repetitions = 5;
  int threads = 0;
};

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

nlohmann::ordered_json common(const LoadedModel& loaded) {
  return {{"version", RLHF_VERSION},
          {"cpu_isa", loaded.compute.table().isa},
          {"threads", loaded.pool.num_threads()},
          {"peak_rss_mb", static_cast<double>(peak_resident_bytes()) / 1e6}};
}

std::vector<TokenId> random_tokens(std::int64_t count, std::int64_t vocab_size, std::uint64_t seed) {
  RandomStream random(seed);
  std::vector<TokenId> tokens;
  for (std::int64_t i = 0; i < count; ++i)
    tokens.push_back(static_cast<TokenId>(random.below(static_cast<std::uint64_t>(vocab_size))));
  return tokens;
}

// Sampling at temperature 1 with end tokens ignored: fixed lengths.
void bench_decode(const Arguments& arguments) {
  LoadedModel loaded(arguments.model, arguments.threads);
  const ModelConfig& config = loaded.model.config();
  std::vector<double> decode, total;
  for (std::int64_t r = 0; r < arguments.repetitions; ++r) {
    RolloutEngineOptions options;
    options.max_sequences = arguments.batch;
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
    while (engine.busy()) engine.step(loaded.model.parameters().weights(), 0);
    const auto& s = engine.statistics();
    total.push_back(static_cast<double>(s.decode_tokens) / watch.seconds());
    if (s.decode_only_seconds > 0)
      decode.push_back(static_cast<double>(s.decode_only_tokens) / s.decode_only_seconds);
  }
  nlohmann::ordered_json out = {{"bench", "decode"},
                                {"model", arguments.model},
                                {"batch", arguments.batch},
                                {"context", arguments.context},
                                {"new_tokens", arguments.new_tokens},
                                {"weights", "fp32"},
                                {"tokens_per_s", median(total)}};
  if (!decode.empty()) out["decode_tokens_per_s"] = median(decode);
  out.update(common(loaded));
  std::cout << out.dump() << "\n";
}

// One optimizer step on packed sequences with the loss on every token.
void bench_train(const Arguments& arguments) {
  ThreadPool pool(arguments.threads);
  const Compute<float> compute(pool, kernels::detect_cpu_isa());
  LanguageModel model = LanguageModel::load(arguments.model, {});
  const ModelConfig& config = model.config();
  const std::int64_t length = std::min(arguments.sequence, arguments.tokens);
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
  SequencePass<float> pass(config, compute);
  Optimizer<float> optimizer({}, model.parameters().trainable().size());
  std::vector<double> step, forward, backward, update;
  for (std::int64_t r = 0; r <= arguments.repetitions; ++r) {
    Stopwatch watch;
    pass.forward(model.parameters().weights(), rows, SequencePass<float>::Keep::kForBackward);
    pass.token_logprobs(model.parameters().weights(), targets, 1, logprobs, {});
    const double f = watch.lap();
    pass.token_logprobs_backward(model.parameters().weights(), targets, 1, gradient, {});
    pass.backward(model.parameters().weights(), rows);
    const double b = watch.lap();
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
                                {"tokens_per_s", tokens / median(step)},
                                {"forward_s", median(forward)},
                                {"backward_s", median(backward)},
                                {"optimizer_s", median(update)},
                                {"cpu_isa", compute.table().isa},
                                {"threads", pool.num_threads()},
                                {"peak_rss_mb", static_cast<double>(peak_resident_bytes()) / 1e6}};
  std::cout << out.dump() << "\n";
}

}  // namespace

void add_bench(CLI::App& app) {
  auto* verb = app.add_subcommand("bench", "Measure: one JSON object per call, medians of repetitions");
  verb->require_subcommand(1);
  auto a = std::make_shared<Arguments>();
  const auto model_options = [a](CLI::App* sub) {
    sub->add_option("--model", a->model, "Hugging Face directory or GGUF file")->required();
    sub->add_option("--threads", a->threads, "0 = one per core")->check(CLI::Range(0, 1024));
    sub->add_option("--repetitions", a->repetitions, "Runs the median is taken of")
        ->check(CLI::Range(1, 1000));
  };
  auto* decode = verb->add_subcommand("decode", "Generation at a fixed batch size");
  model_options(decode);
  decode->add_option("--batch", a->batch, "Sequences that decode at once")->check(CLI::Range(1, 4096));
  decode->add_option("--context", a->context, "Prompt tokens")->check(CLI::Range(1, 1 << 20));
  decode->add_option("--new-tokens", a->new_tokens, "Response tokens")->check(CLI::Range(1, 1 << 20));
  decode->callback([a] { bench_decode(*a); });
  auto* train = verb->add_subcommand("train", "One training step on packed sequences");
  model_options(train);
  train->add_option("--tokens", a->tokens, "Tokens of the step")->check(CLI::Range(2, 1 << 24));
  train->add_option("--sequence", a->sequence, "Tokens of one sequence")->check(CLI::Range(2, 1 << 20));
  train->callback([a] { bench_train(*a); });
}

}  // namespace rlhf::cli

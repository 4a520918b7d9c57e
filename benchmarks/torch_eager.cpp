// The steps of `rlhf bench decode` and `rlhf bench train` in eager PyTorch, through LibTorch's operators.

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/multinomial.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/InferenceMode.h>
#include <torch/headeronly/version.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <iostream>
#include <nlohmann/json.hpp>
#include <thread>

#include "benchmarks/eager_llama.h"
#include "rlhf/core/error.h"
#include "rlhf/train/stage.h"

namespace rlhf::eager {
namespace {

struct Arguments {
  std::string model;
  std::int64_t batch = 1, context = 64, new_tokens = 64, tokens = 1024, sequence = 128, repetitions = 5;
  int threads = 0;
};

double median(std::vector<double> values) {
  std::ranges::sort(values);
  const std::size_t middle = values.size() / 2;
  return values.size() % 2 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

void print(nlohmann::ordered_json out) {
  out["version"] = concat("torch ", TORCH_VERSION);
  out["threads"] = at::get_num_threads();
  out["peak_rss_mb"] = static_cast<double>(peak_resident_bytes()) / 1e6;
  std::cout << out.dump() << "\n";
}

at::Tensor sample(const at::Tensor& logits_BV) {
  return at::multinomial(at::softmax(logits_BV, -1), 1);
}

void decode(const Arguments& arguments) {
  const c10::InferenceMode no_autograd;
  const ModelConfig config = load_model_config(arguments.model);
  const Llama model(config, at::kFloat);
  std::vector<double> total, decode_only;
  for (std::int64_t r = 0; r < arguments.repetitions; ++r) {
    auto cache = model.make_cache(arguments.batch, arguments.context + arguments.new_tokens);
    auto ids = at::randint(config.vocab_size, {arguments.batch, arguments.context});
    Stopwatch watch;
    // The prompt's last token belongs to the first decode step, as everywhere else.
    if (arguments.context > 1) model.forward(ids.narrow(1, 0, arguments.context - 1), &cache);
    ids = ids.narrow(1, arguments.context - 1, 1);
    watch.lap();
    for (std::int64_t t = 0; t < arguments.new_tokens; ++t)
      ids = sample(model.logits(model.forward(ids, &cache)).select(1, 0));
    const double seconds = watch.lap();
    const auto tokens = static_cast<double>(arguments.batch * arguments.new_tokens);
    decode_only.push_back(tokens / seconds);
    total.push_back(tokens / watch.seconds());
  }
  print({{"bench", "decode"},
         {"engine", "torch-eager"},
         {"model", arguments.model},
         {"batch", arguments.batch},
         {"context", arguments.context},
         {"new_tokens", arguments.new_tokens},
         {"weights", "fp32"},
         {"tokens_per_s", median(total)},
         {"decode_tokens_per_s", median(decode_only)}});
}

void train(const Arguments& arguments) {
  const ModelConfig config = load_model_config(arguments.model);
  const Llama model(config, at::kFloat);
  std::vector<at::Tensor> weights, first, second, steps;
  for (const auto& [name, weight] : model.parameters()) {
    weights.push_back(weight.requires_grad_());
    first.push_back(at::zeros_like(weight));
    second.push_back(at::zeros_like(weight));
    steps.push_back(at::zeros({}, at::kFloat));
  }
  const std::int64_t S = std::min(arguments.sequence, arguments.tokens), B = arguments.tokens / S;
  const auto ids_BS = at::randint(config.vocab_size, {B, S});
  const auto targets = ids_BS.narrow(1, 1, S - 1).reshape({-1});
  std::vector<double> step, forward, backward, update;
  for (std::int64_t r = 0; r <= arguments.repetitions; ++r) {
    Stopwatch watch;
    const auto hidden = model.forward(ids_BS, nullptr).narrow(1, 0, S - 1);
    const auto loss = at::cross_entropy_loss(model.logits(hidden).reshape({-1, config.vocab_size}), targets);
    const double f = watch.lap();
    loss.backward();
    const double b = watch.lap();
    {
      const at::NoGradGuard no_grad;
      std::vector<at::Tensor> gradients;
      for (at::Tensor& weight : weights) gradients.push_back(weight.grad());
      for (at::Tensor& count : steps) count.add_(1);
      at::_fused_adamw_(weights, gradients, first, second, {}, steps, 1e-6, 0.9, 0.999, 0.0, 1e-8, false,
                        false);
      for (at::Tensor& weight : weights) weight.mutable_grad().reset();
    }
    const double u = watch.lap();
    if (r == 0) continue;  // page faults of the first pass
    forward.push_back(f);
    backward.push_back(b);
    update.push_back(u);
    step.push_back(f + b + u);
  }
  print({{"bench", "train"},
         {"engine", "torch-eager"},
         {"model", arguments.model},
         {"tokens", B * S},
         {"sequence", S},
         {"weights", "fp32"},
         {"tokens_per_s", static_cast<double>(B * S) / median(step)},
         {"forward_s", median(forward)},
         {"backward_s", median(backward)},
         {"optimizer_s", median(update)}});
}

void prepare(const Arguments& arguments) {
  const auto cores = static_cast<int>(std::thread::hardware_concurrency());
  at::set_num_threads(arguments.threads > 0 ? arguments.threads : std::max(1, cores));
}

}  // namespace
}  // namespace rlhf::eager

int main(int argc, char** argv) {
  using namespace rlhf::eager;
  CLI::App app{
      "torch_eager: decoding and training steps in eager PyTorch, random weights of a model's shape"};
  app.require_subcommand(1);
  Arguments a;
  const auto options = [&](CLI::App* verb) {
    verb->add_option("--model", a.model, "Hugging Face directory or GGUF file; only its shape is read")
        ->required();
    verb->add_option("--threads", a.threads, "0 = one per core")->check(CLI::Range(0, 1024));
    verb->add_option("--repetitions", a.repetitions, "Runs the median is taken of")
        ->check(CLI::Range(1, 1000));
  };
  auto* decode_verb = app.add_subcommand("decode", "Generation at a fixed batch size");
  options(decode_verb);
  decode_verb->add_option("--batch", a.batch, "Sequences that decode at once")->check(CLI::Range(1, 4096));
  decode_verb->add_option("--context", a.context, "Prompt tokens")->check(CLI::Range(1, 1 << 20));
  decode_verb->add_option("--new-tokens", a.new_tokens, "Response tokens")->check(CLI::Range(1, 1 << 20));
  decode_verb->callback([&] { prepare(a), decode(a); });
  auto* train_verb = app.add_subcommand("train", "One training step on sequences of one length");
  options(train_verb);
  train_verb->add_option("--tokens", a.tokens, "Tokens of the step")->check(CLI::Range(2, 1 << 24));
  train_verb->add_option("--sequence", a.sequence, "Tokens of one sequence")->check(CLI::Range(2, 1 << 20));
  train_verb->callback([&] { prepare(a), train(a); });
  try {
    app.parse(argc, argv);
    return 0;
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  } catch (const std::exception& error) {
    std::cerr << "torch_eager: " << error.what() << "\n";
    return 1;
  }
}

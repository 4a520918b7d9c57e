#include <iostream>
#include <nlohmann/json.hpp>

#include "rlhf/cli/verbs.h"
#include "rlhf/config/reader.h"
#include "rlhf/core/error.h"
#include "rlhf/train/build_task.h"
#include "rlhf/train/evaluation.h"

namespace rlhf::cli {
namespace {

struct EvalArguments {
  std::string run, model, output;
  std::vector<std::string> set;
  bool json = false;
};

void evaluate_model(const EvalArguments& arguments) {
  config::LoadOptions load;
  load.overrides = arguments.set;
  RunOptions options = config::load<RunOptions>(arguments.run, load);
  options.stages = {"eval"};
  if (arguments.model.empty() && options.model.path.empty())
    fail<Error>(arguments.run,
                " makes a new model, which knows nothing yet: name a trained one with --model");
  TrainableOptions frozen;
  frozen.mode = TrainableMode::kNone;
  const OpenDevice device(options.device);
  LanguageModel model =
      LanguageModel::load(arguments.model.empty() ? options.model.path : arguments.model, frozen);
  const TaskData data = build_task(options, model);
  ThreadPool pool(static_cast<int>(options.threads));
  if (device.accelerator()) model.parameters().place_on(*device.accelerator());
  StageContext context(Compute<float>(pool, kernels::detect_cpu_isa(), device.accelerator()));
  RunObserver silent;
  context.observer = &silent;
  RolloutOptions rollout = options.rollout;
  rollout.sampling = {};
  rollout.sampling.temperature = options.eval.temperature;
  if (options.eval.max_new_tokens > 0) rollout.max_new_tokens = options.eval.max_new_tokens;
  const Evaluation evaluation = evaluate("model", model, data, rollout, {}, context);
  if (!arguments.output.empty()) save_evaluation(arguments.output, evaluation);
  nlohmann::ordered_json out;
  for (const TaskScore& task : evaluation.tasks)
    out["tasks"][task.task] = {{"score", task.score},
                               {"low", task.interval.low},
                               {"high", task.interval.high},
                               {"count", task.count},
                               {"accuracy", task.accuracy},
                               {"eos_rate", task.eos_rate},
                               {"mean_length", task.mean_length}};
  out["mean"] = mean_score(evaluation);
  out["seconds"] = evaluation.seconds;
  if (arguments.json) {
    std::cout << out.dump(1) << "\n";
    return;
  }
  for (const TaskScore& task : evaluation.tasks)
    std::cout << task.task << ": " << task.score << " [" << task.interval.low << ", " << task.interval.high
              << "] over " << task.count << " cases, mean length " << task.mean_length << "\n";
  std::cout << "mean: " << mean_score(evaluation) << "\n";
}

}  // namespace

void add_eval(CLI::App& app) {
  auto* verb = app.add_subcommand("eval", "Judge a model on the held-out cases of a run file");
  auto a = std::make_shared<EvalArguments>();
  verb->add_option("run", a->run, "Run file (YAML)")->required();
  verb->add_option("--model", a->model,
                   "Model to judge instead of the run's, e.g. runs/NAME/checkpoints/ppo");
  verb->add_option("--output", a->output, "JSONL of judged responses");
  verb->add_option("--set", a->set, "key.path=value")->take_all()->allow_extra_args(false);
  verb->add_flag("--json", a->json, "One JSON object");
  verb->callback([a] { evaluate_model(*a); });
}

}  // namespace rlhf::cli

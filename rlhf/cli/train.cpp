#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cstring>
#include <iostream>
#include <thread>

#include "rlhf/cli/verbs.h"
#include "rlhf/config/reader.h"
#include "rlhf/distributed/gloo_collective.h"
#include "rlhf/train/rank_device.h"
#include "rlhf/train/run_directory.h"

namespace rlhf::cli {
namespace {

struct TrainArguments {
  std::string file;
  std::vector<std::string> set;
  bool resume = false, overwrite = false, json = false;
};

Progress::Options progress_options() {
  Progress::Options options;
  if (!isatty(STDERR_FILENO)) return options;
  options.style = Progress::Style::kTerminal;
  winsize size{};
  if (ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 20) options.width = size.ws_col - 1u;
  return options;
}

// A word as the shell reads it back.
std::string quoted(const std::string& word) {
  const auto is_plain = [](char c) {
    return std::isalnum(static_cast<unsigned char>(c)) || std::strchr("_./=,:+-", c);
  };
  if (!word.empty() && std::all_of(word.begin(), word.end(), is_plain)) return word;
  std::string out = "'";
  for (char c : word) out += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return out + "'";
}

std::chrono::milliseconds timeout_of(const RunOptions& options) {
  return std::chrono::duration_cast<std::chrono::milliseconds>(
      std::chrono::duration<double>(options.distributed.timeout_s));
}

// The processes that a launcher has started as one run.
std::unique_ptr<Collective> join_ranks(const RunOptions& options) {
  const Launch launch = read_launch();
  if (launch.rank == 0 && launch.world_size > 1)
    std::cerr << "rank 0 of " << launch.world_size << " (" << launch.launcher
              << "): waiting for the others at " << launch.address << ":" << launch.port << "\n";
  return connect(launch, timeout_of(options));
}

// Processes of one machine share its cores.
RunOptions with_own_threads(RunOptions options, int ranks_here) {
  if (options.threads == 0 && ranks_here > 1)
    options.threads = std::max(1, static_cast<int>(std::thread::hardware_concurrency()) / ranks_here);
  return options;
}

// A rank that computes and leaves speaking and writing to rank 0.
void follow(const RunOptions& options, const PipelineSettings& settings) {
  RunObserver nobody;
  try {
    Pipeline(with_own_threads(options, settings.ranks_here), settings, nobody).run();
  } catch (const StageStopped&) {
    throw ExitCode{1};
  } catch (const Error& error) {
    fail<Error>("rank ", settings.collective->rank(), ": ", error.what());
  }
}

void train(const TrainArguments& arguments) {
  config::LoadOptions load;
  load.overrides = arguments.set;
  const auto options = config::load<RunOptions>(arguments.file, load);
  using Start = PipelineSettings::Start;
  const Start start = arguments.resume      ? Start::kResume
                      : arguments.overwrite ? Start::kOverwrite
                                            : Start::kFresh;
  const auto collective = join_ranks(options);
  PipelineSettings settings;
  settings.start = start;
  settings.directory = options.directory();
  settings.stop = &stop_flag();
  settings.fingerprint = fingerprint_of(options);
  settings.collective = collective.get();
  settings.ranks_here = ranks_on_this_machine(*collective);
  const RankDevice device(options.device, *collective,
                          {.is_done = cuda_queue_is_done,
                           .timeout = timeout_of(options),
                           .nccl_library = process_environment("RLHF_NCCL_LIBRARY").value_or("")});
  settings.accelerator = device.accelerator();
  catch_interrupts();
  if (!collective->is_first()) return follow(options, settings);
  RunDirectory directory(options, start, progress_options(),
                         [](std::string_view text) { std::cerr << text << std::flush; });
  std::cerr << "device: " << device.text() << "\n";
  Pipeline pipeline(with_own_threads(options, settings.ranks_here), settings, directory);
  try {
    const RunReport report = pipeline.run();
    directory.finish(report);
    std::cout << (arguments.json ? to_summary_json(report) : to_report_markdown(report)) << std::endl;
  } catch (const StageStopped&) {
    std::cerr << "stopped; continue with: rlhf train " << quoted(arguments.file);
    for (const std::string& set : arguments.set) std::cerr << " --set " << quoted(set);
    std::cerr << " --resume\n";
    throw ExitCode{1};
  }
  std::cerr << "results: " << (directory.path() / "report.md").string() << "\n";
  if (options.eval.fail_when_worse && pipeline.final_is_worse()) {
    std::cerr << "rlhf: the final model is worse than the SFT model on the held-out cases\n";
    throw ExitCode{1};
  }
}

}  // namespace

void add_train(CLI::App& app) {
  auto* verb = app.add_subcommand("train", "Run the stages of a run file");
  auto arguments = std::make_shared<TrainArguments>();
  verb->add_option("run", arguments->file, "Run file (YAML)")->required();
  verb->add_option("--set", arguments->set, "key.path=value, overrides the file; may be given often")
      ->take_all()
      ->allow_extra_args(false);
  auto* resume = verb->add_flag("--resume", arguments->resume, "Continue an unfinished run");
  verb->add_flag("--overwrite", arguments->overwrite, "Replace the run in the run directory")
      ->excludes(resume);
  verb->add_flag("--json", arguments->json, "Print summary.json instead of the report");
  verb->callback([arguments] { train(*arguments); });
}

}  // namespace rlhf::cli

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cstring>
#include <iostream>

#include "rlhf/cli/verbs.h"
#include "rlhf/config/reader.h"
#include "rlhf/kernels/cuda_device.h"
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

// What `device: auto` became, and why.
void say_device(Device wanted) {
  if (wanted != Device::kAuto) return;
  const CudaStatus gpu = cuda_status();
  std::cerr << "device: cpu (" << (gpu.usable ? "runs on a GPU are not there yet; found " : "") << gpu.text
            << ")\n";
}

void train(const TrainArguments& arguments) {
  config::LoadOptions load;
  load.overrides = arguments.set;
  const auto options = config::load<RunOptions>(arguments.file, load);
  using Start = PipelineSettings::Start;
  const Start start = arguments.resume      ? Start::kResume
                      : arguments.overwrite ? Start::kOverwrite
                                            : Start::kFresh;
  RunDirectory directory(options, start, progress_options(),
                         [](std::string_view text) { std::cerr << text << std::flush; });
  say_device(options.device);
  catch_interrupts();
  PipelineSettings settings;
  settings.start = start;
  settings.directory = directory.path();
  settings.stop = &stop_flag();
  settings.fingerprint = directory.fingerprint();
  Pipeline pipeline(options, settings, directory);
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

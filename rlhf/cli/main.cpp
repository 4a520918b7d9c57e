#include <unistd.h>

#include <atomic>
#include <csignal>
#include <iostream>

#include "rlhf/cli/verbs.h"
#include "rlhf/core/error.h"

namespace rlhf::cli {
namespace {

std::atomic<bool> stop_requested{false};

extern "C" void handle_interrupt(int) {
  if (stop_requested.exchange(true)) _exit(130);
}

}  // namespace

const std::atomic<bool>& stop_flag() {
  return stop_requested;
}

void catch_interrupts() {
  struct sigaction action {};
  action.sa_handler = handle_interrupt;
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
}

}  // namespace rlhf::cli

int main(int argc, char** argv) {
  CLI::App app{"rlhf: fine-tunes language models from feedback, in one process"};
  app.set_version_flag("--version", RLHF_VERSION);
  app.require_subcommand(1);
  try {
    rlhf::cli::add_train(app);
    rlhf::cli::add_generate(app);
    rlhf::cli::add_score(app);
    rlhf::cli::add_tokenize(app);
    rlhf::cli::add_eval(app);
    rlhf::cli::add_inspect(app);
    rlhf::cli::add_config(app);
    rlhf::cli::add_convert(app);
    rlhf::cli::add_bench(app);
    rlhf::cli::add_verify(app);
    rlhf::cli::add_simulate(app);
    rlhf::cli::add_plan(app);
    rlhf::cli::add_replay(app);
    app.parse(argc, argv);
    return 0;
  } catch (const CLI::RequiredError& error) {
    // CLI11 asks for a subcommand and does not say which word it could not use.
    if (argc < 2 || !app.get_subcommands().empty() || argv[1][0] == '-') return app.exit(error) == 0 ? 0 : 2;
    std::cerr << "rlhf: there is no verb '" << argv[1] << "'; rlhf --help lists them\n";
    return 2;
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  } catch (const rlhf::cli::ExitCode& exit) {
    return exit.code;
  } catch (const rlhf::ConfigError& error) {
    std::cerr << "rlhf: bad configuration:\n" << error.what() << "\n";
    return 2;
  } catch (const std::exception& error) {
    std::cerr << "rlhf: " << error.what() << "\n";
    return 1;
  }
}

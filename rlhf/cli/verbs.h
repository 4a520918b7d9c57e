#pragma once

#include <CLI/CLI.hpp>
#include <atomic>

namespace rlhf::cli {

/// Each adds one verb to the program. The verb's callback throws rlhf errors and ExitCode; main turns them
/// into exit codes: 0 ok, 1 failure, 2 bad configuration or usage.
void add_train(CLI::App& app);
void add_generate(CLI::App& app);
void add_score(CLI::App& app);
void add_tokenize(CLI::App& app);
void add_eval(CLI::App& app);
void add_inspect(CLI::App& app);
void add_config(CLI::App& app);
void add_convert(CLI::App& app);
void add_bench(CLI::App& app);
void add_verify(CLI::App& app);
void add_simulate(CLI::App& app);
void add_plan(CLI::App& app);
void add_replay(CLI::App& app);

/// Ends the program with a code after everything has been said.
struct ExitCode {
  int code = 1;
};

/// Set by the first Ctrl-C; the second ends the program at once.
const std::atomic<bool>& stop_flag();
/// Installs the Ctrl-C handler.
void catch_interrupts();

}  // namespace rlhf::cli

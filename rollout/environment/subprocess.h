#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "rollout/environment/environment.h"

namespace rlhf {

/// Bounds of a program that is run for a policy. They keep a run alive; they are no sandbox: the program may
/// read and write whatever this user may.
struct SubprocessLimits {
  double max_seconds = 10;                       ///< from start to end; then its process group is killed
  double max_cpu_seconds = 10;                   ///< RLIMIT_CPU, rounded up to seconds
  std::uint64_t max_memory_bytes = 1024u << 20;  ///< RLIMIT_AS, of each process
  std::size_t max_output_bytes = 4096;           ///< of standard output; a program that writes more is ended
};

struct SubprocessResult {
  enum class End {
    kExited,     ///< `code` is its exit status
    kSignalled,  ///< `code` is the signal
    kTooSlow,
    kTooMuchOutput,
    kAbandoned,   ///< nobody waited for it any more
    kNotStarted,  ///< `errors` says why
  };
  End end = End::kNotStarted;
  int code = 0;
  std::string output;  ///< what it wrote, as far as the limit
  std::string errors;  ///< the same of standard error
};

/// Runs a program to its end: no shell, a process group of its own, `input` on standard input, no other file
/// descriptors, and of the environment variables PATH, HOME, LANG and TMPDIR alone. When it has ended,
/// however it did, what is left of its process group is killed. A process that leaves the group (setsid) is
/// not. Thread-safe. Forks, which costs time with the size of this process' page tables.
/// @param argv program (looked up in PATH when it holds no slash) and arguments
SubprocessResult run_subprocess(const std::vector<std::string>& argv, const std::string& input,
                                const SubprocessLimits& limits, const CallLimit& limit);

}  // namespace rlhf

#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>

#include "rlhf/core/clock.h"

namespace rlhf {

/// Where a run stands. Numbers that a stage does not have stay empty.
struct ProgressState {
  std::int64_t iteration = 0;  ///< iterations done in this stage
  std::optional<double> tokens_per_s;
  std::optional<double> loss;
  std::optional<double> reward;
  std::optional<double> kl;
};

/// Shows progress: one line that is rewritten in a terminal, plain lines otherwise. It prints nothing itself;
/// text goes to a sink. Not thread-safe.
class Progress {
 public:
  enum class Style { kTerminal, kPlain };
  using Sink = std::function<void(std::string_view)>;

  struct Options {
    Style style = Style::kPlain;
    double min_interval_s = 0.1;  ///< between two updates of a terminal line
    double plain_interval_s = 5;  ///< between two plain lines
    std::size_t width = 100;      ///< longest terminal line in columns
  };

  Progress(Options options, Clock clock, Sink sink);
  /// Ends an open terminal line.
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  /// Starts a stage of `num_iterations`. The time left is estimated from what this process did: a resumed
  /// stage may begin with any iteration.
  void begin_stage(std::string name, std::int64_t num_iterations);
  /// Shows a state, unless the last one was shown a moment ago. The last iteration is always shown.
  void update(const ProgressState& state);
  /// Ends the stage with a line that says how long it took.
  void end_stage();
  /// Prints a line of its own, e.g. a warning, without disturbing the progress line.
  void message(std::string_view text);

 private:
  std::string format(const ProgressState& state) const;
  void end_line();

  Options options_;
  Clock clock_;
  Sink sink_;
  std::string stage_;
  std::int64_t num_iterations_ = 0;
  std::optional<std::int64_t> first_iteration_;  ///< that this process finished in the stage
  double stage_begin_s_ = 0;
  std::optional<double> last_shown_s_;
  std::string open_line_;
};

/// Returns "4.2s", "3m 07s" or "2h 05m".
std::string format_duration(double seconds);

}  // namespace rlhf

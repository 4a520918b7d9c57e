#include "rlhf/report/progress.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <utility>

#include "rlhf/core/error.h"

namespace rlhf {
namespace {

std::string number(const char* format, double value) {
  char buffer[64];
  std::snprintf(buffer, sizeof buffer, format, value);
  return buffer;
}

}  // namespace

std::string format_duration(double seconds) {
  if (!(seconds >= 0) || seconds > 1e9) return "?";
  if (seconds < 60) return number("%.1fs", seconds);
  const auto whole = static_cast<long>(std::lround(seconds));
  char buffer[64];
  if (whole < 3600) {
    std::snprintf(buffer, sizeof buffer, "%ldm %02lds", whole / 60, whole % 60);
  } else {
    std::snprintf(buffer, sizeof buffer, "%ldh %02ldm", whole / 3600, whole % 3600 / 60);
  }
  return buffer;
}

Progress::Progress(Options options, Clock clock, Sink sink)
    : options_(options), clock_(std::move(clock)), sink_(std::move(sink)) {
  RLHF_CHECK(clock_ && sink_, "progress: needs a clock and a sink");
}

Progress::~Progress() {
  try {
    end_line();
  } catch (...) {  // a sink that fails must not end the program from a destructor
  }
}

void Progress::begin_stage(std::string name, std::int64_t num_iterations) {
  end_line();
  stage_ = std::move(name);
  num_iterations_ = num_iterations;
  first_iteration_.reset();
  stage_begin_s_ = clock_();
  last_shown_s_.reset();
}

std::string Progress::format(const ProgressState& state) const {
  const double elapsed = clock_() - stage_begin_s_;
  const std::int64_t done = state.iteration + 1 - first_iteration_.value_or(state.iteration);
  std::string line = concat(stage_, ' ', state.iteration, '/', num_iterations_);
  if (done > 0 && state.iteration < num_iterations_) {
    const double left =
        elapsed / static_cast<double>(done) * static_cast<double>(num_iterations_ - state.iteration);
    line += concat("  ETA ", format_duration(left));
  }
  if (state.tokens_per_s) line += number("  %.0f tok/s", *state.tokens_per_s);
  if (state.loss) line += number("  loss %.4f", *state.loss);
  if (state.reward) line += number("  reward %.3f", *state.reward);
  if (state.kl) line += number("  KL %.4f", *state.kl);
  return line;
}

void Progress::update(const ProgressState& state) {
  const bool terminal = options_.style == Style::kTerminal;
  const double now = clock_();
  if (!first_iteration_) first_iteration_ = state.iteration;
  const double interval = terminal ? options_.min_interval_s : options_.plain_interval_s;
  const bool is_last = state.iteration >= num_iterations_;
  if (!is_last && last_shown_s_ && now - *last_shown_s_ < interval) return;
  last_shown_s_ = now;
  std::string line = format(state);
  if (!terminal) return sink_(line + "\n");
  if (line.size() > options_.width) line.resize(options_.width);
  open_line_ = line;
  sink_("\r\x1b[K" + line);
}

void Progress::end_line() {
  if (open_line_.empty()) return;
  open_line_.clear();
  sink_("\n");
}

void Progress::end_stage() {
  end_line();
  sink_(concat(stage_, " done in ", format_duration(clock_() - stage_begin_s_), "\n"));
}

void Progress::message(std::string_view text) {
  if (open_line_.empty()) return sink_(concat(text, "\n"));
  sink_(concat("\r\x1b[K", text, "\n", open_line_));
}

}  // namespace rlhf

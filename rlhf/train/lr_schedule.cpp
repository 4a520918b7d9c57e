#include "rlhf/train/lr_schedule.h"

#include <algorithm>
#include <cmath>

#include "rlhf/core/error.h"

namespace rlhf {
namespace {

constexpr double kPi = 3.14159265358979323846;

double warmup_length(const LrScheduleOptions& options, double total) {
  if (options.warmup_steps > 0) return static_cast<double>(options.warmup_steps);
  return std::ceil(options.warmup_ratio * total);
}

double cosine(const LrScheduleOptions& options, double progress) {
  const double half = 0.5 * (1.0 - options.min_ratio);
  const double wave =
      half * std::cos(kPi * options.cycles * 2.0 * progress) + 0.5 * (1.0 + options.min_ratio);
  return std::max(options.min_ratio, wave);
}

double restarts(const LrScheduleOptions& options, double progress) {
  if (progress >= 1) return 0;
  return std::max(0.0, 0.5 * (1.0 + std::cos(kPi * std::fmod(options.cycles * progress, 1.0))));
}

double stable_decay(const LrScheduleOptions& options, double step, double warmup, double total) {
  const double remaining = std::max(0.0, total - warmup);
  const double decay = options.decay_steps > 0 ? static_cast<double>(options.decay_steps)
                                               : remaining - std::floor(remaining * options.stable_ratio);
  const double start = warmup + remaining - decay;
  if (step < start) return 1;
  if (step >= start + decay) return options.min_ratio;
  const double wave =
      std::max(0.0, 0.5 * (1.0 + std::cos(kPi * options.cycles * 2.0 * (step - start) / decay)));
  return (1.0 - options.min_ratio) * wave + options.min_ratio;
}

double inverse_sqrt(double step, double warmup) {
  constexpr double kDefaultTimescale = 10000;
  const double timescale = warmup > 0 ? warmup : kDefaultTimescale;
  return 1.0 / std::sqrt((step + timescale - warmup) / timescale);
}

}  // namespace

double learning_rate_factor(const LrScheduleOptions& options, std::size_t step_index,
                            std::size_t total_steps) {
  const auto step = static_cast<double>(step_index);
  const auto total = static_cast<double>(total_steps);
  const double warmup = warmup_length(options, total);
  if (step < warmup) return options.start_ratio + (1.0 - options.start_ratio) * step / warmup;
  const double progress = (step - warmup) / std::max(1.0, total - warmup);
  switch (options.shape) {
    case LrShape::kConstant:
      return 1;
    case LrShape::kLinear:
      return std::max(0.0, (total - step) / std::max(1.0, total - warmup));
    case LrShape::kCosine:
      return cosine(options, progress);
    case LrShape::kCosineWithRestarts:
      return restarts(options, progress);
    case LrShape::kPolynomial:
      if (step > total) return options.min_ratio;
      return (1.0 - options.min_ratio) * std::pow(1.0 - progress, options.power) + options.min_ratio;
    case LrShape::kInverseSqrt:
      return inverse_sqrt(step, warmup);
    case LrShape::kWarmupStableDecay:
      return stable_decay(options, step, warmup, total);
  }
  fail<InternalError>("learning_rate_factor: unknown shape");
}

}  // namespace rlhf

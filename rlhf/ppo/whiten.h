#pragma once

#include <span>
#include <vector>

#include "rlhf/ppo/rows.h"

namespace rlhf::ppo {

/// Whitening of a batch over its counting tokens, as the frameworks do it.
enum class Whitening {
  kNone,
  kBessel,         ///< (x - mean) / sqrt(var_{n-1} + 1e-8), with a float32 n / (n - 1): TRL PPO
  kBesselShifted,  ///< as kBessel, with means over n + 1e-8: verl
  kBiased,         ///< (x - mean) / sqrt(max(var_n, 1e-8)): OpenRLHF, NeMo
  kCentre,         ///< x - mean: OpenRLHF with no_std_norm, flash_reinforce
};

/// Whether the mean goes away or is added back after scaling (TRL's reward whitening keeps it).
enum class MeanHandling { kRemove, kKeep };

struct Moments {
  double mean = 0;
  double variance = 0;
};

/// Mean and variance over the counting tokens in the given variant (kCentre and kNone: biased).
/// @throws InvalidArgument when no token counts, or only one and the variant divides by n - 1.
Moments masked_moments(Whitening kind, const TokenRows& rows, std::span<const double> values);

/// Whitens all positions with moments of the counting ones. Positions that do not count are transformed too,
/// as TRL, verl and OpenRLHF do; zero_masked() clears them where a framework does that afterwards.
/// @throws InvalidArgument as masked_moments; kNone returns a copy.
std::vector<double> whiten(Whitening kind, MeanHandling mean, const TokenRows& rows,
                           std::span<const double> values);

/// Sets positions that do not count to 0.
void zero_masked(const TokenRows& rows, std::span<double> values);

}  // namespace rlhf::ppo

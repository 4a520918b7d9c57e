#include "rlhf/ppo/whiten.h"

#include <algorithm>
#include <cmath>

#include "rlhf/core/error.h"

namespace rlhf::ppo {
namespace {

constexpr double kEpsilon = 1e-8;

bool uses_bessel(Whitening kind) {
  return kind == Whitening::kBessel || kind == Whitening::kBesselShifted;
}

double inverse_deviation(Whitening kind, double variance) {
  if (kind == Whitening::kCentre) return 1.0;
  if (kind == Whitening::kBiased) return 1.0 / std::sqrt(std::max(variance, kEpsilon));
  return 1.0 / std::sqrt(variance + kEpsilon);
}

// n / (n - 1). TRL forms it in float32 whatever the precision of the values; a relative 6e-8 at most.
double bessel_factor(Whitening kind, double tokens) {
  if (kind == Whitening::kBessel) return static_cast<float>(tokens) / static_cast<float>(tokens - 1.0);
  return tokens / (tokens - 1.0);
}

}  // namespace

Moments masked_moments(Whitening kind, const TokenRows& rows, std::span<const double> values) {
  check_rows(rows);
  check_positions(rows, values.size(), "whitening");
  const auto tokens = static_cast<double>(count_tokens(rows));
  RLHF_CHECK(tokens > 0, "whitening: no token of the batch counts");
  RLHF_CHECK(tokens > 1 || !uses_bessel(kind), "whitening: one counting token has no unbiased variance");
  const double denominator = tokens + (kind == Whitening::kBesselShifted ? kEpsilon : 0.0);

  Moments moments;
  for (std::size_t t = 0; t < values.size(); ++t) {
    if (rows.counts(t)) moments.mean += values[t];
  }
  moments.mean /= denominator;
  for (std::size_t t = 0; t < values.size(); ++t) {
    if (rows.counts(t)) moments.variance += (values[t] - moments.mean) * (values[t] - moments.mean);
  }
  moments.variance /= denominator;
  if (uses_bessel(kind)) moments.variance *= bessel_factor(kind, tokens);
  return moments;
}

std::vector<double> whiten(Whitening kind, MeanHandling mean, const TokenRows& rows,
                           std::span<const double> values) {
  std::vector<double> result(values.begin(), values.end());
  if (kind == Whitening::kNone) return result;
  const Moments moments = masked_moments(kind, rows, values);
  const double scale = inverse_deviation(kind, moments.variance);
  const double shift = mean == MeanHandling::kKeep ? moments.mean : 0.0;
  for (double& value : result) value = (value - moments.mean) * scale + shift;
  return result;
}

void zero_masked(const TokenRows& rows, std::span<double> values) {
  for (std::size_t t = 0; t < values.size(); ++t) {
    if (!rows.counts(t)) values[t] = 0;
  }
}

}  // namespace rlhf::ppo

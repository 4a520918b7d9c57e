#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "rlhf/model/sequence_pass.h"

namespace rlhf {

/// Rows of the vocabulary that are held of a model at a time.
inline constexpr std::size_t kDistributionRows = 32;

/// Calls `visit(i, log_p)` with the log-probabilities [V] at temperature 1 after rows[i] of the last forward
/// of `pass`, for every i in order. kDistributionRows are held at a time.
void for_each_distribution(SequencePass<float>& pass, const DecoderWeights<float>& weights,
                           std::span<const std::int64_t> rows,
                           const std::function<void(std::size_t, std::span<const float>)>& visit);

/// For each row the sum over the vocabulary of the squared probabilities at a temperature: what the token
/// baselines need beside the log-prob of the token.
std::vector<double> sums_of_squared_probabilities(SequencePass<float>& pass,
                                                  const DecoderWeights<float>& weights,
                                                  std::span<const std::int64_t> rows, double temperature);

}  // namespace rlhf

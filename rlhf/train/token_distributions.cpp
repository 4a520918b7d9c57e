#include "rlhf/train/token_distributions.h"

#include <algorithm>
#include <cmath>

namespace rlhf {
namespace {}

void for_each_distribution(SequencePass<float>& pass, const DecoderWeights<float>& weights,
                           std::span<const std::int64_t> rows,
                           const std::function<void(std::size_t, std::span<const float>)>& visit) {
  const auto vocabulary = static_cast<std::size_t>(weights.head.N);
  std::vector<float> log_p(std::min(kDistributionRows, rows.size()) * vocabulary);
  for (std::size_t begin = 0; begin < rows.size(); begin += kDistributionRows) {
    const auto chunk = rows.subspan(begin, std::min(kDistributionRows, rows.size() - begin));
    pass.log_distributions(weights, chunk, {log_p.data(), chunk.size() * vocabulary});
    for (std::size_t i = 0; i < chunk.size(); ++i)
      visit(begin + i, {log_p.data() + i * vocabulary, vocabulary});
  }
}

std::vector<double> sums_of_squared_probabilities(SequencePass<float>& pass,
                                                  const DecoderWeights<float>& weights,
                                                  std::span<const std::int64_t> rows, double temperature) {
  std::vector<double> sums(rows.size());
  for_each_distribution(pass, weights, rows, [&](std::size_t i, std::span<const float> log_p) {
    // At temperature T: p(k) = exp(log_p(k) / T) / sum_j exp(log_p(j) / T). The largest of them stays near 1.
    const double largest = static_cast<double>(*std::ranges::max_element(log_p));
    double total = 0, squares = 0;
    for (const float value : log_p) {
      const double weight = std::exp((static_cast<double>(value) - largest) / temperature);
      total += weight;
      squares += weight * weight;
    }
    sums[i] = squares / (total * total);
  });
  return sums;
}

}  // namespace rlhf

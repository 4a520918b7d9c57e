#pragma once

#include <cstddef>
#include <map>
#include <span>

#include "rlhf/data/sample.h"
#include "rlhf/train/ppo_batch.h"

namespace rlhf {

/// Expected lengths of responses in tokens: what a prompt's last responses had, the mean of the last batch
/// for a prompt that is new, and the limit before there was one. Only the balance of the ranks depends on it.
class LengthPrediction {
 public:
  explicit LengthPrediction(double limit) : mean_(limit) {}

  double of(const Prompt& prompt) const {
    const auto found = means_.find(&prompt);
    return found == means_.end() ? mean_ : found->second;
  }
  void observe(std::span<const PpoResponse> batch) {
    std::map<const Prompt*, std::pair<double, double>> sums;
    double tokens = 0;
    for (const PpoResponse& response : batch) {
      auto& [sum, count] = sums[response.prompt];
      sum += static_cast<double>(response.sample.tokens.size());
      ++count;
      tokens += static_cast<double>(response.sample.tokens.size());
    }
    mean_ = tokens / static_cast<double>(batch.size());
    for (const auto& [prompt, sum] : sums) means_[prompt] = sum.first / sum.second;
  }

 private:
  std::map<const Prompt*, double> means_;
  double mean_;
};

}  // namespace rlhf

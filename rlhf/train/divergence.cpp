#include "rlhf/train/divergence.h"

#include <algorithm>
#include <cmath>

#include "rlhf/core/error.h"
#include "rlhf/model/packed_rows.h"
#include "rlhf/train/token_distributions.h"

namespace rlhf {
namespace {

struct Position {
  std::size_t text = 0;
  std::int64_t row = 0;  // that predicts the token
};

double kl_of(std::span<const float> log_p, std::span<const float> log_q) {
  double sum = 0;
  for (std::size_t i = 0; i < log_p.size(); ++i) {
    const double lp = static_cast<double>(log_p[i]);
    sum += std::exp(lp) * (lp - static_cast<double>(log_q[i]));
  }
  return sum;
}

}  // namespace

std::vector<double> policy_kl(const ModelConfig& config, const DecoderWeights<float>& policy,
                              const DecoderWeights<float>& reference, const std::vector<ScoredText>& texts,
                              std::int64_t max_tokens_per_pass, Compute<float> compute) {
  using Pass = SequencePass<float>;
  Pass policy_pass(config, compute), reference_pass(config, compute);
  std::vector<std::span<const TokenId>> all;
  for (const ScoredText& text : texts) {
    RLHF_CHECK(text.mask.size() == text.tokens.size(), "policy_kl: ", text.mask.size(), " mask entries for ",
               text.tokens.size(), " tokens");
    all.emplace_back(text.tokens);
  }
  const auto vocabulary = static_cast<std::size_t>(config.vocab_size);
  std::vector<float> log_p(kDistributionRows * vocabulary), log_q(kDistributionRows * vocabulary);
  std::vector<double> kl(texts.size());
  for (const auto& items : split_into_passes(all, max_tokens_per_pass)) {
    std::vector<std::span<const TokenId>> sequences;
    for (const std::size_t item : items) sequences.push_back(all[item]);
    const PackedRows rows(sequences);
    policy_pass.forward(policy, rows, Pass::Keep::kNothing);
    reference_pass.forward(reference, rows, Pass::Keep::kNothing);
    std::vector<Position> positions;
    for (std::size_t s = 0; s < items.size(); ++s)
      for (std::size_t t = 1; t < sequences[s].size(); ++t)
        if (texts[items[s]].mask[t])
          positions.push_back({items[s], rows.row(s, static_cast<std::int64_t>(t) - 1)});
    for (std::size_t begin = 0; begin < positions.size(); begin += kDistributionRows) {
      const std::size_t count = std::min(kDistributionRows, positions.size() - begin);
      std::vector<std::int64_t> chunk;
      for (std::size_t i = 0; i < count; ++i) chunk.push_back(positions[begin + i].row);
      policy_pass.log_distributions(policy, chunk, {log_p.data(), count * vocabulary});
      reference_pass.log_distributions(reference, chunk, {log_q.data(), count * vocabulary});
      for (std::size_t i = 0; i < count; ++i)
        kl[positions[begin + i].text] +=
            kl_of({log_p.data() + i * vocabulary, vocabulary}, {log_q.data() + i * vocabulary, vocabulary});
    }
  }
  return kl;
}

}  // namespace rlhf

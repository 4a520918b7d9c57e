#include "rollout/sampling/filter.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "rlhf/core/error.h"

namespace rlhf {
namespace {

void check_token(TokenId token, std::size_t vocabulary) {
  RLHF_CHECK(token >= 0 && static_cast<std::size_t>(token) < vocabulary, "sampling: token ", token,
             " outside a vocabulary of ", vocabulary);
}

void apply_repetition_penalty(double penalty, std::span<const TokenId> context, std::span<float> logits) {
  // Read all, then write: a token that occurs twice is penalised once.
  std::unordered_map<TokenId, float> changed;
  for (const TokenId token : context) {
    check_token(token, logits.size());
    const float logit = logits[static_cast<std::size_t>(token)];
    const auto factor = static_cast<float>(penalty);
    changed.emplace(token, logit < 0 ? logit * factor : logit / factor);
  }
  for (const auto& [token, logit] : changed) logits[static_cast<std::size_t>(token)] = logit;
}

void apply_count_penalties(const SamplingOptions& options, std::span<const TokenId> generated,
                           std::span<float> logits) {
  std::unordered_map<TokenId, std::size_t> counts;
  for (const TokenId token : generated) {
    check_token(token, logits.size());
    ++counts[token];
  }
  for (const auto& [token, count] : counts) {
    logits[static_cast<std::size_t>(token)] -=
        static_cast<float>(options.presence_penalty + options.frequency_penalty * static_cast<double>(count));
  }
}

bool larger(const KeptToken& a, const KeptToken& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
}

void keep_top_k(std::size_t k, std::vector<KeptToken>& tokens) {
  if (k >= tokens.size()) return;
  std::nth_element(tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(k - 1), tokens.end(), larger);
  const float threshold = tokens[k - 1].logit;
  // Everything that ties with the k-th stays, as in transformers.
  tokens.erase(
      std::remove_if(tokens.begin(), tokens.end(), [&](const KeptToken& t) { return t.logit < threshold; }),
      tokens.end());
}

struct Mass {
  double largest = -std::numeric_limits<double>::infinity();
  double sum = 0;  ///< of exp(logit - largest)
};

Mass mass_of(const std::vector<KeptToken>& tokens) {
  Mass mass;
  for (const KeptToken& t : tokens) mass.largest = std::max(mass.largest, static_cast<double>(t.logit));
  for (const KeptToken& t : tokens) mass.sum += std::exp(t.logit - mass.largest);
  return mass;
}

// A token goes when it and everything smaller hold at most 1 - top_p. From the top: it stays while the mass
// above it is below top_p. Sorts growing heads instead of the whole row: few tokens usually hold the mass.
void keep_top_p(double top_p, std::size_t least, std::vector<KeptToken>& tokens) {
  const Mass mass = mass_of(tokens);
  const double target = top_p * mass.sum;
  double above = 0;
  std::size_t kept = 0;
  std::size_t sorted = 0;
  std::size_t block = 64;
  while (kept < tokens.size() && (above < target || kept < least)) {
    if (kept == sorted) {
      const std::size_t end = std::min(sorted + block, tokens.size());
      std::partial_sort(tokens.begin() + static_cast<std::ptrdiff_t>(sorted),
                        tokens.begin() + static_cast<std::ptrdiff_t>(end), tokens.end(), larger);
      sorted = end;
      block *= 4;
    }
    above += std::exp(tokens[kept].logit - mass.largest);
    ++kept;
  }
  tokens.resize(std::max(kept, std::min<std::size_t>(least, tokens.size())));
}

void keep_min_p(double min_p, std::size_t least, std::vector<KeptToken>& tokens) {
  const double largest = mass_of(tokens).largest;
  const auto keeps = [&](const KeptToken& t) { return std::exp(t.logit - largest) >= min_p; };
  const std::size_t floor = std::min(least, tokens.size());
  std::partial_sort(tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(floor), tokens.end(),
                    larger);
  tokens.erase(std::remove_if(tokens.begin() + static_cast<std::ptrdiff_t>(floor), tokens.end(),
                              [&](const KeptToken& t) { return !keeps(t); }),
               tokens.end());
}

std::vector<KeptToken> finite_tokens(std::span<const float> logits) {
  std::vector<KeptToken> tokens;
  tokens.reserve(logits.size());
  for (std::size_t i = 0; i < logits.size(); ++i) {
    RLHF_CHECK(!std::isnan(logits[i]), "sampling: the logit of token ", i, " is NaN");
    if (logits[i] != -std::numeric_limits<float>::infinity()) {
      tokens.push_back({static_cast<TokenId>(i), logits[i]});
    }
  }
  RLHF_CHECK(!tokens.empty(), "sampling: every logit is -inf");
  return tokens;
}

}  // namespace

void apply_penalties(const SamplingOptions& options, const SamplingHistory& history,
                     std::span<float> logits) {
  if (history.logit_bias != nullptr) {
    for (const auto& [token, bias] : *history.logit_bias) {
      check_token(token, logits.size());
      logits[static_cast<std::size_t>(token)] += bias;
    }
  }
  if (options.presence_penalty != 0 || options.frequency_penalty != 0) {
    apply_count_penalties(options, history.generated, logits);
  }
  if (options.repetition_penalty != 1.0)
    apply_repetition_penalty(options.repetition_penalty, history.context, logits);
}

void apply_temperature(const SamplingOptions& options, std::span<float> logits) {
  if (options.temperature == 0 || options.temperature == 1.0) return;
  const auto temperature = static_cast<float>(options.temperature);
  for (float& logit : logits) logit /= temperature;
}

std::vector<KeptToken> filter_tokens(const SamplingOptions& options, std::span<const float> logits) {
  std::vector<KeptToken> tokens = finite_tokens(logits);
  const std::size_t least = std::max<std::size_t>(options.min_tokens_to_keep, 1);
  if (options.top_k > 0) keep_top_k(std::max(options.top_k, least), tokens);
  if (options.top_p < 1) keep_top_p(options.top_p, least, tokens);
  if (options.min_p) keep_min_p(*options.min_p, least, tokens);
  std::sort(tokens.begin(), tokens.end(),
            [](const KeptToken& a, const KeptToken& b) { return a.token < b.token; });
  return tokens;
}

}  // namespace rlhf

// Closed forms of the preference losses. Two responses a and b; b wins two of three comparisons, p = 2/3. A
// loss that is minimised over all policies fixes the log-ratio margin D = log pi(b)/ref(b) - log
// pi(a)/ref(a); each value below is the minimum worked out on paper. Descent on preference_loss must arrive
// there.
#include <array>
#include <cmath>

#include "rlhf/ppo/preference_loss.h"
#include "tests/catch.h"

namespace rlhf::ppo {
namespace {

constexpr std::size_t kTokens = 4, kLength = 2;
using Logits = std::array<std::array<double, kTokens>, kLength>;
using Response = std::array<std::size_t, kLength>;

// The tokens of a response are drawn from one table a position.
std::array<double, kLength> log_probs(const Logits& logits, const Response& y) {
  std::array<double, kLength> result{};
  for (std::size_t t = 0; t < kLength; ++t) {
    double sum = 0;
    for (const double z : logits[t]) sum += std::exp(z);
    result[t] = logits[t][y[t]] - std::log(sum);
  }
  return result;
}
double log_prob(const Logits& logits, const Response& y) {
  const auto tokens = log_probs(logits, y);
  return tokens[0] + tokens[1];
}

constexpr Response kA = {0, 1}, kB = {2, 3};
// b over a, b over a, a over b: the chosen responses, then the rejected ones.
constexpr std::array<Response, 6> kRows = {kB, kB, kA, kA, kA, kB};
constexpr Logits kReference = {{{0.3, -0.2, 0.1, 0.5}, {-0.4, 0.2, 0.6, 0.0}}};

// Gradient descent with momentum until nothing moves.
Logits minimise(const PreferenceOptions& options) {
  std::vector<std::size_t> offsets = {0};
  for (std::size_t i = 0; i < kRows.size(); ++i) offsets.push_back(offsets.back() + kLength);
  std::vector<double> chosen, rejected;
  for (std::size_t i = 0; i < 3; ++i) {
    chosen.push_back(log_prob(kReference, kRows[i]));
    rejected.push_back(log_prob(kReference, kRows[i + 3]));
  }
  Logits policy = kReference, velocity{};
  for (int step = 0; step < 6000; ++step) {
    std::vector<double> tokens;
    for (const Response& y : kRows)
      for (const double lp : log_probs(policy, y)) tokens.push_back(lp);
    const auto result = preference_loss(options, {{offsets, {}}, tokens, chosen, rejected});
    for (std::size_t t = 0; t < kLength; ++t)
      for (std::size_t k = 0; k < kTokens; ++k) {
        const double p = std::exp(log_probs(policy, {k, k})[t]);
        double gradient = 0;
        for (std::size_t i = 0; i < kRows.size(); ++i)
          gradient += result.d_log_probs[i * kLength + t] * ((kRows[i][t] == k) - p);
        velocity[t][k] = 0.9 * velocity[t][k] - 0.02 * gradient;
      }
    for (std::size_t t = 0; t < kLength; ++t)
      for (std::size_t k = 0; k < kTokens; ++k) policy[t][k] += velocity[t][k];
  }
  return policy;
}

double logit(double p) {
  return std::log(p / (1 - p));
}

}  // namespace

TEST_CASE("preference losses reach their closed forms") {
  constexpr double kBeta = 0.5, kSmoothing = 0.1, kP = 2.0 / 3;
  struct Case {
    PreferenceKind kind;
    double margin;
    bool against_reference = true;
  };
  const Case cases[] = {
      {PreferenceKind::kSigmoid, logit(kP) / kBeta},
      {PreferenceKind::kConservative, logit(kP * (1 - kSmoothing) + (1 - kP) * kSmoothing) / kBeta},
      {PreferenceKind::kRobust, logit((kP - kSmoothing) / (1 - 2 * kSmoothing)) / kBeta},
      // The kink of the hinge: slope -2 below margin 1, +1 above.
      {PreferenceKind::kHinge, 1 / kBeta},
      {PreferenceKind::kIpo, (2 * kP - 1) / (2 * kBeta)},
      // q log q + (1 - q) log(1 - q) - q ((2p - 1) logit(1 - e)) + const, q = s(m)
      {PreferenceKind::kExoPair, (2 * kP - 1) * logit(1 - kSmoothing) / kBeta},
      // Each response by itself: b is chosen twice and rejected once.
      {PreferenceKind::kBcoPair, 2 * logit(kP) / kBeta},
      {PreferenceKind::kNcaPair, (logit(2.0 / 3.5) - logit(1.0 / 2.5)) / kBeta},
      {PreferenceKind::kSppoHard, 2 * (2 * kP - 1) / (2 * kBeta)},
      // Means over two tokens.
      {PreferenceKind::kSigmoidNorm, 2 * logit(kP) / kBeta},
      // With a margin gamma the two directions of a pair pull against one another: no closed form.
      {PreferenceKind::kSimpo, 2 * logit(kP * (1 - kSmoothing) + (1 - kP) * kSmoothing) / kBeta, false},
  };
  for (const Case& c : cases) {
    PreferenceOptions options;
    options.terms = {{c.kind, 1.0}};
    options.beta = kBeta;
    options.label_smoothing = kSmoothing;
    options.simpo_gamma = 0;
    options.ipo_scale = IpoScale::kSum;
    const Logits policy = minimise(options);
    double margin = log_prob(policy, kB) - log_prob(policy, kA);
    if (c.against_reference) margin -= log_prob(kReference, kB) - log_prob(kReference, kA);
    INFO("loss " << static_cast<int>(c.kind) << ": margin " << margin << ", closed form " << c.margin);
    // The hinge's descent steps across its kink.
    CHECK(margin == Approx(c.margin).margin(c.kind == PreferenceKind::kHinge ? 0.05 : 1e-4));
  }
}

}  // namespace rlhf::ppo

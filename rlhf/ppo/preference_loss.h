#pragma once

#include <optional>
#include <span>
#include <vector>

#include "rlhf/config/field.h"
#include "rlhf/ppo/rows.h"

namespace rlhf::ppo {

/// Losses on pairs (chosen, rejected). With c, r the log-ratios to the reference of the two responses after
/// the divergence's transform, and m = beta (c - r):
enum class PreferenceKind {
  kSigmoid,       ///< -log s(m) (DPO, Rafailov et al. 2023)
  kConservative,  ///< the same with label smoothing (cDPO)
  kRobust,        ///< the smoothed loss made unbiased: / (1 - 2 eps)
  kHinge,         ///< max(0, 1 - m) (SLiC)
  kIpo,           ///< (c - r - 1 / (2 beta))^2
  kExoPair,       ///< KL(s(m) || smoothed label)
  kNcaPair,       ///< -log s(bc) - 0.5 log s(-bc) - 0.5 log s(-br)
  kBcoPair,       ///< -log s(bc) - log s(-br)
  kSppoHard,      ///< (c - 1/(2 beta))^2 + (r + 1/(2 beta))^2
  kAot,           ///< sigmoid on sorted policy margins minus sorted reference margins
  kAotUnpaired,   ///< sigmoid on sorted c minus sorted r
  kApoZero,       ///< 1 - s(bc) + s(br)
  kApoDown,       ///< s(bc) + 1 - s(m)
  kDiscopop,      ///< mixture of logistic and exponential, modulated by s(m / tau)
  kSigmoidNorm,   ///< sigmoid on per-token averages
  kSimpo,         ///< -log s(beta (mean lp chosen - mean lp rejected) - gamma), no reference (SimPO)
  kOrpo,          ///< -log s(log odds chosen - log odds rejected) times beta, no reference; add kSft (ORPO)
  kSft,           ///< mean negative log-prob of the chosen tokens
};

/// Which f-divergence the implicit reward belongs to (Wang et al. 2024).
enum class PreferenceDivergence { kReverseKl, kForwardKl, kJensenShannon, kAlpha };

/// Whether IPO works on sums or on means over tokens.
enum class IpoScale { kTokenMean, kSum };

struct PreferenceTerm {
  PreferenceKind kind = PreferenceKind::kSigmoid;
  double weight = 1.0;

  template <class V>
  void visit_fields(V& v) {
    v.choice("kind", kind,
             {{"sigmoid", PreferenceKind::kSigmoid},
              {"conservative", PreferenceKind::kConservative},
              {"robust", PreferenceKind::kRobust},
              {"hinge", PreferenceKind::kHinge},
              {"ipo", PreferenceKind::kIpo},
              {"exo_pair", PreferenceKind::kExoPair},
              {"nca_pair", PreferenceKind::kNcaPair},
              {"bco_pair", PreferenceKind::kBcoPair},
              {"sppo_hard", PreferenceKind::kSppoHard},
              {"aot", PreferenceKind::kAot},
              {"aot_unpaired", PreferenceKind::kAotUnpaired},
              {"apo_zero", PreferenceKind::kApoZero},
              {"apo_down", PreferenceKind::kApoDown},
              {"discopop", PreferenceKind::kDiscopop},
              {"sigmoid_norm", PreferenceKind::kSigmoidNorm},
              {"simpo", PreferenceKind::kSimpo},
              {"orpo", PreferenceKind::kOrpo},
              {"sft", PreferenceKind::kSft}},
             "Loss on pairs");
    v.field("weight", weight, "Weight of this loss");
  }
};

struct PreferenceOptions {
  std::vector<PreferenceTerm> terms{PreferenceTerm{}};
  double beta = 0.1;
  double label_smoothing = 0;  ///< probability that a label is wrong, [0, 0.5)
  PreferenceDivergence divergence = PreferenceDivergence::kReverseKl;
  double alpha = 0.5;  ///< of PreferenceDivergence::kAlpha
  IpoScale ipo_scale = IpoScale::kTokenMean;
  double discopop_tau = 0.05;
  double simpo_gamma = 0.5;  ///< margin of SimPO
  std::optional<double>
      length_desensitisation;  ///< LD-DPO alpha: weight of tokens beyond the shorter response

  template <class V>
  void visit_fields(V& v) {
    v.list("terms", terms, "Losses that are added up");
    v.field("beta", beta, "Strength of the tie to the reference", config::positive());
    v.field("label_smoothing", label_smoothing, "Probability that a label is wrong",
            config::Bounds{0, 0.499});
    v.choice("divergence", divergence,
             {{"reverse_kl", PreferenceDivergence::kReverseKl},
              {"forward_kl", PreferenceDivergence::kForwardKl},
              {"js_divergence", PreferenceDivergence::kJensenShannon},
              {"alpha_divergence", PreferenceDivergence::kAlpha}},
             "Divergence behind the implicit reward");
    v.field("alpha", alpha, "Order of alpha_divergence");
    v.choice("ipo_scale", ipo_scale, {{"token_mean", IpoScale::kTokenMean}, {"sum", IpoScale::kSum}},
             "Whether IPO takes means over tokens");
    v.field("discopop_tau", discopop_tau, "Temperature of discopop", config::positive());
    v.field("simpo_gamma", simpo_gamma, "Margin of simpo", config::at_least(0));
    v.field("length_desensitisation", length_desensitisation,
            "Weight of tokens beyond the shorter response of the pair; none = 1", config::fraction());
  }
  void validate(config::Problems& problems) const;
};

/// Whether a term compares with a reference: all but simpo, orpo and sft do.
bool needs_reference(const PreferenceOptions& options);
/// Whether a term couples the pairs of a batch: aot and aot_unpaired sort them, sft is a mean over all
/// tokens. The other losses are means over pairs, each by itself.
bool needs_whole_batch(const PreferenceOptions& options);

/// Rows 0 .. n - 1 are the chosen responses, rows n .. 2n - 1 the rejected ones of the same pairs.
struct PreferenceInputs {
  TokenRows rows;
  std::span<const double> log_probs;  ///< per position
  std::span<const double>
      reference_chosen;  ///< per pair: summed log-prob under the reference; may be empty for
  std::span<const double> reference_rejected;  ///< losses that need none
};

struct PreferenceResult {
  double loss = 0;                  ///< mean over pairs, terms added up
  std::vector<double> d_log_probs;  ///< per position
  /// Per pair: beta * log-ratio; without a reference, beta * mean log-prob of the tokens (SimPO).
  std::vector<double> chosen_rewards;
  std::vector<double> rejected_rewards;
  double accuracy = 0;  ///< share of pairs whose chosen reward is the larger
};

/// @throws InvalidArgument on an odd number of rows, sizes that do not fit, a missing reference.
PreferenceResult preference_loss(const PreferenceOptions& options, const PreferenceInputs& inputs);

/// KTO and its unpaired relatives: single responses marked desirable or not.
enum class UnpairedKind { kKto, kApoZero };

struct UnpairedOptions {
  UnpairedKind kind = UnpairedKind::kKto;
  double beta = 0.1;
  double desirable_weight = 1.0;
  double undesirable_weight = 1.0;

  template <class V>
  void visit_fields(V& v) {
    v.choice("kind", kind, {{"kto", UnpairedKind::kKto}, {"apo_zero_unpaired", UnpairedKind::kApoZero}},
             "Loss");
    v.field("beta", beta, "Strength of the tie to the reference", config::positive());
    v.field("desirable_weight", desirable_weight, "Weight of desirable responses", config::at_least(0));
    v.field("undesirable_weight", undesirable_weight, "Weight of undesirable responses", config::at_least(0));
  }
};

struct UnpairedInputs {
  TokenRows rows;
  std::span<const double> log_probs;        ///< per position
  std::span<const double> reference;        ///< per row: summed log-prob under the reference
  std::span<const std::uint8_t> desirable;  ///< per row
  std::span<const double> mismatched;  ///< KTO: summed log-probs of mismatched pairs, policy; empty = KL 0
  std::span<const double> mismatched_reference;  ///< the same under the reference
};

struct UnpairedResult {
  double loss = 0;
  double kl = 0;  ///< KTO's reference point max(0, mean(mismatched - mismatched_reference)); no gradient
  std::vector<double> d_log_probs;
};

/// @throws InvalidArgument on sizes that do not fit.
UnpairedResult unpaired_loss(const UnpairedOptions& options, const UnpairedInputs& inputs);

/// Reward model on pairs.
enum class RewardModelKind {
  kSigmoid,  ///< -log s(chosen - rejected - margin)
  kLogExp,   ///< log(1 + exp(rejected - chosen)), no margin (OpenRLHF LogExpLoss)
};

struct RewardModelLossOptions {
  RewardModelKind kind = RewardModelKind::kSigmoid;
  double centring =
      0;  ///< coefficient of mean((chosen + rejected)^2), which fixes the free constant; 0 = off

  template <class V>
  void visit_fields(V& v) {
    v.choice("kind", kind, {{"sigmoid", RewardModelKind::kSigmoid}, {"log_exp", RewardModelKind::kLogExp}},
             "Bradley-Terry loss");
    v.field("centring", centring,
            "Weight of (r_chosen + r_rejected)^2, which keeps scores near zero; 0 = off",
            config::at_least(0));
  }
};

struct RewardModelInputs {
  std::span<const double> chosen;    ///< per pair
  std::span<const double> rejected;  ///< per pair
  std::span<const double> margins;   ///< per pair, or empty
};

struct RewardModelResult {
  double loss = 0;  ///< mean over pairs
  std::vector<double> d_chosen;
  std::vector<double> d_rejected;
  double accuracy = 0;  ///< share of pairs with chosen > rejected
  double margin = 0;    ///< mean of chosen - rejected
};

/// @throws InvalidArgument on no pairs or sizes that do not fit.
RewardModelResult reward_model_loss(const RewardModelLossOptions& options, const RewardModelInputs& inputs);

/// Expected calibration error of pair probabilities s(chosen - rejected) over `bins` equal bins of confidence
/// in [0.5, 1]: sum over bins of share * |accuracy - mean confidence|. @throws InvalidArgument on no pairs or
/// bins.
double pairwise_calibration_error(std::span<const double> chosen, std::span<const double> rejected,
                                  std::size_t bins);

}  // namespace rlhf::ppo

#include "rlhf/ppo/preference_loss.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "rlhf/core/error.h"
#include "rlhf/ppo/kl.h"
#include "rlhf/ppo/logistic.h"

namespace rlhf::ppo {
namespace {

// A loss of two numbers and its derivatives.
struct PairTerm {
  double value = 0;
  double d_first = 0;
  double d_second = 0;
};

PairTerm of_difference(double value, double derivative) {
  return {value, derivative, -derivative};
}

// -log s(x) with label smoothing eps, and its derivative.
ValueAndGradient smoothed_logistic(double x, double eps) {
  return {-(1 - eps) * log_sigmoid(x) - eps * log_sigmoid(-x), -(1 - eps) * sigmoid(-x) + eps * sigmoid(x)};
}

ValueAndGradient robust(double x, double eps) {
  return {(-(1 - eps) * log_sigmoid(x) + eps * log_sigmoid(-x)) / (1 - 2 * eps),
          (-(1 - eps) * sigmoid(-x) - eps * sigmoid(x)) / (1 - 2 * eps)};
}

ValueAndGradient exo_pair(double x, double eps) {
  const double win = log_sigmoid(x) - std::log1p(-eps);
  const double lose = log_sigmoid(-x) - std::log(eps);
  const double p = sigmoid(x);
  const double q = sigmoid(-x);
  // The +p q - q p that stems from the logarithms cancels.
  return {p * win + q * lose, p * q * (win - lose)};
}

ValueAndGradient discopop(double x, double tau) {
  const double gate = sigmoid(x / tau);
  const double logistic = -log_sigmoid(x);
  const double exponential = std::exp(-x);
  return {logistic * (1 - gate) + exponential * gate, -sigmoid(-x) * (1 - gate) - exponential * gate +
                                                          (exponential - logistic) * gate * (1 - gate) / tau};
}

// Losses of m = beta (c - r) alone.
PairTerm margin_term(const PreferenceOptions& o, PreferenceKind kind, double chosen, double rejected) {
  const double m = o.beta * (chosen - rejected);
  ValueAndGradient term;
  switch (kind) {
    case PreferenceKind::kSigmoid:
      term = smoothed_logistic(m, 0);
      break;
    case PreferenceKind::kConservative:
      term = smoothed_logistic(m, o.label_smoothing);
      break;
    case PreferenceKind::kRobust:
      term = robust(m, o.label_smoothing);
      break;
    case PreferenceKind::kExoPair:
      term = exo_pair(m, o.label_smoothing);
      break;
    case PreferenceKind::kDiscopop:
      term = discopop(m, o.discopop_tau);
      break;
    default:
      term = m < 1 ? ValueAndGradient{1 - m, -1} : ValueAndGradient{};
  }
  return of_difference(term.value, o.beta * term.gradient);
}

PairTerm ipo_term(double beta, double chosen, double rejected) {
  const double e = chosen - rejected - 1 / (2 * beta);
  return of_difference(e * e, 2 * e);
}

// Losses that treat the two responses apart.
PairTerm separate_term(const PreferenceOptions& o, PreferenceKind kind, double chosen, double rejected) {
  const double b = o.beta;
  const double c = b * chosen;
  const double r = b * rejected;
  switch (kind) {
    case PreferenceKind::kNcaPair:
      return {-log_sigmoid(c) - 0.5 * log_sigmoid(-c) - 0.5 * log_sigmoid(-r),
              b * (-sigmoid(-c) + 0.5 * sigmoid(c)), b * 0.5 * sigmoid(r)};
    case PreferenceKind::kBcoPair:
      return {-log_sigmoid(c) - log_sigmoid(-r), -b * sigmoid(-c), b * sigmoid(r)};
    case PreferenceKind::kSppoHard: {
      const double win = chosen - 0.5 / b;
      const double lose = rejected + 0.5 / b;
      return {win * win + lose * lose, 2 * win, 2 * lose};
    }
    default:
      fail<InternalError>("preference_loss: kind ", static_cast<int>(kind),
                          " is not a loss of separate responses");
  }
}

double log_odds(double mean_log_prob) {
  return mean_log_prob - std::log1p(-std::exp(mean_log_prob));
}

// Log-ratios to the reference, transformed by the divergence, with their derivatives.
ValueAndGradient transform(const PreferenceOptions& o, double log_ratio) {
  switch (o.divergence) {
    case PreferenceDivergence::kReverseKl:
      return {log_ratio, 1};
    case PreferenceDivergence::kForwardKl:
      return {-std::exp(-log_ratio), std::exp(-log_ratio)};
    case PreferenceDivergence::kJensenShannon:
      return {log_sigmoid(log_ratio), sigmoid(-log_ratio)};
    case PreferenceDivergence::kAlpha: {
      const double order = o.alpha - 1;
      if (std::abs(order) < 1e-6) return {log_ratio, 1};
      constexpr double kLargestExponent = 80;
      const bool clamped = order * log_ratio > kLargestExponent;
      const double e = std::exp(clamped ? kLargestExponent : order * log_ratio);
      return {e / order, clamped ? 0 : e};
    }
  }
  fail<InternalError>("preference_loss: unknown divergence");
}

struct Response {
  double log_prob = 0;   ///< (length-desensitised) sum
  double plain_sum = 0;  ///< plain sum
  double tokens = 0;     ///< counting tokens, at least 1
  double log_ratio = 0;
  ValueAndGradient score;  ///< transformed log-ratio
  // Derivatives of the loss, filled by the terms.
  double d_log_prob = 0;   ///< with respect to log_prob
  double d_plain_sum = 0;  ///< with respect to plain_sum
};

class PairBatch {
 public:
  PairBatch(const PreferenceOptions& options, const PreferenceInputs& inputs);

  double add(const PreferenceTerm& term);
  PreferenceResult result(double loss) const;

 private:
  double per_pair(PreferenceKind kind, double scale);
  double apo(PreferenceKind kind, double scale);
  double sorted(PreferenceKind kind, double scale);
  double sft(double scale);
  PairTerm evaluate(PreferenceKind kind, const Response& chosen, const Response& rejected) const;
  double token_weight(std::size_t row, std::size_t number) const;
  double reward(const Response& response) const;

  const PreferenceOptions& options_;
  const PreferenceInputs& inputs_;
  std::size_t pairs_;
  std::vector<Response> responses_;  // chosen, then rejected
};

bool needs_no_reference(PreferenceKind kind) {
  return kind == PreferenceKind::kSimpo || kind == PreferenceKind::kOrpo || kind == PreferenceKind::kSft;
}

void check_pairs(const PreferenceOptions& o, const PreferenceInputs& in) {
  check_rows(in.rows);
  check_positions(in.rows, in.log_probs.size(), "preference loss: log_probs");
  RLHF_CHECK(in.rows.rows() > 0 && in.rows.rows() % 2 == 0, "preference loss: ", in.rows.rows(),
             " responses; expected the chosen ones followed by as many rejected ones");
  RLHF_CHECK(o.label_smoothing >= 0 && o.label_smoothing < 0.5, "preference loss: label_smoothing is ",
             o.label_smoothing, ", expected [0, 0.5)");
  const std::size_t pairs = in.rows.rows() / 2;
  for (const PreferenceTerm& term : o.terms) {
    RLHF_CHECK(term.kind != PreferenceKind::kExoPair || o.label_smoothing > 0,
               "preference loss: exo_pair needs label_smoothing above 0");
    if (needs_no_reference(term.kind)) continue;
    RLHF_CHECK(in.reference_chosen.size() == pairs && in.reference_rejected.size() == pairs,
               "preference loss: ", in.reference_chosen.size(), " and ", in.reference_rejected.size(),
               " reference log-probs for ", pairs, " pairs");
  }
}

PairBatch::PairBatch(const PreferenceOptions& options, const PreferenceInputs& inputs)
    : options_(options), inputs_(inputs), pairs_(inputs.rows.rows() / 2), responses_(inputs.rows.rows()) {
  const TokenRows& rows = inputs.rows;
  for (std::size_t row = 0; row < rows.rows(); ++row) {
    Response& r = responses_[row];
    std::size_t number = 0;
    for (std::size_t t = rows.begin(row); t < rows.end(row); ++t) {
      if (!rows.counts(t)) continue;
      r.plain_sum += inputs.log_probs[t];
      r.log_prob += token_weight(row, number++) * inputs.log_probs[t];
    }
    r.tokens = std::max(static_cast<double>(number), 1.0);
    const auto reference = row < pairs_ ? inputs.reference_chosen : inputs.reference_rejected;
    r.log_ratio = r.log_prob - (reference.empty() ? 0.0 : reference[row % pairs_]);
    r.score = transform(options, r.log_ratio);
  }
}

// LD-DPO: tokens beyond the length of the shorter response of the pair weigh less.
double PairBatch::token_weight(std::size_t row, std::size_t number) const {
  if (!options_.length_desensitisation) return 1;
  const std::size_t partner = row < pairs_ ? row + pairs_ : row - pairs_;
  const std::size_t shared = std::min(count_tokens(inputs_.rows, row), count_tokens(inputs_.rows, partner));
  return number < shared ? 1.0 : *options_.length_desensitisation;
}

PairTerm PairBatch::evaluate(PreferenceKind kind, const Response& c, const Response& r) const {
  switch (kind) {
    case PreferenceKind::kSigmoid:
    case PreferenceKind::kConservative:
    case PreferenceKind::kRobust:
    case PreferenceKind::kExoPair:
    case PreferenceKind::kDiscopop:
    case PreferenceKind::kHinge:
      return margin_term(options_, kind, c.score.value, r.score.value);
    case PreferenceKind::kIpo:
    case PreferenceKind::kSigmoidNorm: {
      const bool mean = kind == PreferenceKind::kSigmoidNorm || options_.ipo_scale == IpoScale::kTokenMean;
      const double chosen_scale = mean ? 1 / c.tokens : 1;
      const double rejected_scale = mean ? 1 / r.tokens : 1;
      const double chosen = c.score.value * chosen_scale;
      const double rejected = r.score.value * rejected_scale;
      PairTerm term = kind == PreferenceKind::kIpo
                          ? ipo_term(options_.beta, chosen, rejected)
                          : margin_term(options_, PreferenceKind::kSigmoid, chosen, rejected);
      term.d_first *= chosen_scale;
      term.d_second *= rejected_scale;
      return term;
    }
    default:
      return separate_term(options_, kind, c.score.value, r.score.value);
  }
}

// APO takes the log-ratios themselves; only the margin of apo_down goes through the divergence.
double PairBatch::apo(PreferenceKind kind, double scale) {
  const double beta = options_.beta;
  const auto slope = [&](double x) { return scale * beta * sigmoid(beta * x) * sigmoid(-beta * x); };
  double loss = 0;
  for (std::size_t i = 0; i < pairs_; ++i) {
    Response& c = responses_[i];
    Response& r = responses_[i + pairs_];
    const double chosen = sigmoid(beta * c.log_ratio);
    if (kind == PreferenceKind::kApoZero) {
      loss += scale * (1 - chosen + sigmoid(beta * r.log_ratio));
      c.d_log_prob -= slope(c.log_ratio);
      r.d_log_prob += slope(r.log_ratio);
    } else {
      const double margin = c.score.value - r.score.value;
      loss += scale * (chosen + 1 - sigmoid(beta * margin));
      c.d_log_prob += slope(c.log_ratio) - slope(margin) * c.score.gradient;
      r.d_log_prob += slope(margin) * r.score.gradient;
    }
  }
  return loss;
}

double PairBatch::per_pair(PreferenceKind kind, double scale) {
  double loss = 0;
  for (std::size_t i = 0; i < pairs_; ++i) {
    Response& c = responses_[i];
    Response& r = responses_[i + pairs_];
    const PairTerm term = evaluate(kind, c, r);
    loss += scale * term.value;
    c.d_log_prob += scale * term.d_first * c.score.gradient;
    r.d_log_prob += scale * term.d_second * r.score.gradient;
  }
  return loss;
}

std::vector<std::size_t> ascending(std::span<const double> values) {
  std::vector<std::size_t> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return values[a] < values[b]; });
  return order;
}

// AOT: compares sorted lists, so that a gradient goes to whoever holds the rank.
double PairBatch::sorted(PreferenceKind kind, double scale) {
  std::vector<double> first(pairs_);
  std::vector<double> second(pairs_);
  for (std::size_t i = 0; i < pairs_; ++i) {
    const Response& c = responses_[i];
    const Response& r = responses_[i + pairs_];
    const bool paired = kind == PreferenceKind::kAot;
    first[i] = paired ? c.log_prob - r.log_prob : c.log_ratio;
    second[i] = paired ? inputs_.reference_chosen[i] - inputs_.reference_rejected[i] : r.log_ratio;
  }
  const std::vector<std::size_t> first_order = ascending(first);
  const std::vector<std::size_t> second_order = ascending(second);
  double loss = 0;
  for (std::size_t rank = 0; rank < pairs_; ++rank) {
    const std::size_t i = first_order[rank];
    const std::size_t j = second_order[rank];
    const ValueAndGradient term =
        smoothed_logistic(options_.beta * (first[i] - second[j]), options_.label_smoothing);
    loss += scale * term.value;
    const double slope = scale * options_.beta * term.gradient;
    responses_[i].d_log_prob += slope;
    responses_[(kind == PreferenceKind::kAot ? i : j) + pairs_].d_log_prob -= slope;
  }
  return loss;
}

double PairBatch::sft(double scale) {
  double sum = 0;
  double tokens = 0;
  for (std::size_t i = 0; i < pairs_; ++i) {
    sum += responses_[i].plain_sum;
    tokens += static_cast<double>(count_tokens(inputs_.rows, i));
  }
  if (tokens == 0) return 0;
  for (std::size_t i = 0; i < pairs_; ++i) responses_[i].d_plain_sum -= scale / tokens;
  return -scale * sum / tokens;
}

double PairBatch::add(const PreferenceTerm& term) {
  const double scale = term.weight / static_cast<double>(pairs_);
  if (term.kind == PreferenceKind::kSft) return sft(term.weight);
  if (term.kind == PreferenceKind::kAot || term.kind == PreferenceKind::kAotUnpaired)
    return sorted(term.kind, scale);
  if (term.kind == PreferenceKind::kApoZero || term.kind == PreferenceKind::kApoDown)
    return apo(term.kind, scale);
  if (!needs_no_reference(term.kind)) return per_pair(term.kind, scale);
  double loss = 0;
  for (std::size_t i = 0; i < pairs_; ++i) {
    Response& c = responses_[i];
    Response& r = responses_[i + pairs_];
    const double chosen = c.plain_sum / c.tokens;
    const double rejected = r.plain_sum / r.tokens;
    if (term.kind == PreferenceKind::kSimpo) {
      const double x = options_.beta * (chosen - rejected) - options_.simpo_gamma;
      const ValueAndGradient t = smoothed_logistic(x, options_.label_smoothing);
      loss += scale * t.value;
      c.d_plain_sum += scale * t.gradient * options_.beta / c.tokens;
      r.d_plain_sum -= scale * t.gradient * options_.beta / r.tokens;
    } else {
      const double x = log_odds(chosen) - log_odds(rejected);
      loss -= scale * options_.beta * log_sigmoid(x);
      const double slope = -scale * options_.beta * sigmoid(-x);
      c.d_plain_sum += slope / (-std::expm1(chosen)) / c.tokens;
      r.d_plain_sum -= slope / (-std::expm1(rejected)) / r.tokens;
    }
  }
  return loss;
}

double PairBatch::reward(const Response& response) const {
  const bool referred = !inputs_.reference_chosen.empty();
  return options_.beta * (referred ? response.log_ratio : response.plain_sum / response.tokens);
}

PreferenceResult PairBatch::result(double loss) const {
  PreferenceResult result;
  result.loss = loss;
  result.d_log_probs.assign(inputs_.rows.positions(), 0.0);
  for (std::size_t row = 0; row < responses_.size(); ++row) {
    const Response& r = responses_[row];
    std::size_t number = 0;
    for (std::size_t t = inputs_.rows.begin(row); t < inputs_.rows.end(row); ++t) {
      if (!inputs_.rows.counts(t)) continue;
      result.d_log_probs[t] = r.d_log_prob * token_weight(row, number++) + r.d_plain_sum;
    }
  }
  for (std::size_t i = 0; i < pairs_; ++i) {
    result.chosen_rewards.push_back(reward(responses_[i]));
    result.rejected_rewards.push_back(reward(responses_[i + pairs_]));
    result.accuracy += (result.chosen_rewards[i] > result.rejected_rewards[i]) / static_cast<double>(pairs_);
  }
  return result;
}

bool uses_smoothing(PreferenceKind kind) {
  return kind == PreferenceKind::kConservative || kind == PreferenceKind::kRobust ||
         kind == PreferenceKind::kExoPair || kind == PreferenceKind::kAot ||
         kind == PreferenceKind::kAotUnpaired || kind == PreferenceKind::kSimpo;
}

template <class Predicate>
bool any_term(const PreferenceOptions& options, const Predicate& predicate) {
  return std::ranges::any_of(options.terms, predicate, &PreferenceTerm::kind);
}

}  // namespace

void PreferenceOptions::validate(config::Problems& problems) const {
  if (terms.empty()) problems.add("terms", "there is no loss: give at least one term");
  if (label_smoothing == 0 && any_term(*this, [](auto kind) { return kind == PreferenceKind::kExoPair; }))
    problems.add("label_smoothing", "exo_pair needs a value above 0");
  if (label_smoothing > 0 && !any_term(*this, uses_smoothing))
    problems.add("label_smoothing",
                 "no term uses it; conservative, robust, exo_pair, aot, aot_unpaired and simpo do");
}

bool needs_reference(const PreferenceOptions& options) {
  return any_term(options, [](PreferenceKind kind) { return !needs_no_reference(kind); });
}

bool needs_whole_batch(const PreferenceOptions& options) {
  return any_term(options, [](PreferenceKind kind) {
    return kind == PreferenceKind::kAot || kind == PreferenceKind::kAotUnpaired ||
           kind == PreferenceKind::kSft;
  });
}

PreferenceResult preference_loss(const PreferenceOptions& options, const PreferenceInputs& inputs) {
  check_pairs(options, inputs);
  PairBatch batch(options, inputs);
  double loss = 0;
  for (const PreferenceTerm& term : options.terms) loss += batch.add(term);
  return batch.result(loss);
}

UnpairedResult unpaired_loss(const UnpairedOptions& options, const UnpairedInputs& in) {
  check_rows(in.rows);
  check_positions(in.rows, in.log_probs.size(), "unpaired loss: log_probs");
  check_row_values(in.rows, in.reference.size(), "unpaired loss: reference");
  check_row_values(in.rows, in.desirable.size(), "unpaired loss: desirable");
  RLHF_CHECK(in.mismatched.size() == in.mismatched_reference.size(), "unpaired loss: ", in.mismatched.size(),
             " mismatched log-probs, ", in.mismatched_reference.size(), " of the reference");
  RLHF_CHECK(in.rows.rows() > 0, "unpaired loss: no responses");
  UnpairedResult result;
  if (options.kind == UnpairedKind::kKto && !in.mismatched.empty()) {
    for (std::size_t i = 0; i < in.mismatched.size(); ++i) {
      result.kl +=
          (in.mismatched[i] - in.mismatched_reference[i]) / static_cast<double>(in.mismatched.size());
    }
    result.kl = std::max(result.kl, 0.0);
  }
  result.d_log_probs.assign(in.rows.positions(), 0.0);
  for (std::size_t row = 0; row < in.rows.rows(); ++row) {
    const double sign = in.desirable[row] ? 1.0 : -1.0;
    const double weight = (in.desirable[row] ? options.desirable_weight : options.undesirable_weight) /
                          static_cast<double>(in.rows.rows());
    const double log_ratio = row_sum(in.rows, row, in.log_probs) - in.reference[row];
    const double x = sign * options.beta * (log_ratio - result.kl);
    result.loss += weight * sigmoid(-x);
    const double slope = -weight * sign * options.beta * sigmoid(x) * sigmoid(-x);
    for (std::size_t t = in.rows.begin(row); t < in.rows.end(row); ++t) {
      if (in.rows.counts(t)) result.d_log_probs[t] = slope;
    }
  }
  return result;
}

RewardModelResult reward_model_loss(const RewardModelLossOptions& options, const RewardModelInputs& in) {
  const std::size_t pairs = in.chosen.size();
  RLHF_CHECK(pairs > 0, "reward model loss: no pairs");
  RLHF_CHECK(in.rejected.size() == pairs && (in.margins.empty() || in.margins.size() == pairs),
             "reward model loss: ", pairs, " chosen, ", in.rejected.size(), " rejected rewards and ",
             in.margins.size(), " margins");
  const double scale = 1.0 / static_cast<double>(pairs);
  RewardModelResult result;
  for (std::size_t i = 0; i < pairs; ++i) {
    const bool margin = options.kind == RewardModelKind::kSigmoid && !in.margins.empty();
    const double x = in.chosen[i] - in.rejected[i] - (margin ? in.margins[i] : 0.0);
    const double sum = in.chosen[i] + in.rejected[i];
    result.loss += scale * (-log_sigmoid(x) + options.centring * sum * sum);
    const double slope = -scale * sigmoid(-x);
    const double centre = scale * 2 * options.centring * sum;
    result.d_chosen.push_back(slope + centre);
    result.d_rejected.push_back(-slope + centre);
    result.accuracy += scale * (in.chosen[i] > in.rejected[i]);
    result.margin += scale * (in.chosen[i] - in.rejected[i]);
  }
  return result;
}

double pairwise_calibration_error(std::span<const double> chosen, std::span<const double> rejected,
                                  std::size_t bins) {
  RLHF_CHECK(!chosen.empty() && chosen.size() == rejected.size() && bins > 0,
             "calibration error: ", chosen.size(), " chosen and ", rejected.size(), " rejected rewards in ",
             bins, " bins");
  std::vector<double> confidence(bins), correct(bins), count(bins);
  for (std::size_t i = 0; i < chosen.size(); ++i) {
    const double p = sigmoid(std::abs(chosen[i] - rejected[i]));
    const auto bin = std::min(static_cast<std::size_t>((p - 0.5) * 2 * static_cast<double>(bins)), bins - 1);
    confidence[bin] += p;
    correct[bin] += chosen[i] > rejected[i] ? 1.0 : (chosen[i] == rejected[i] ? 0.5 : 0.0);
    count[bin] += 1;
  }
  double error = 0;
  for (std::size_t bin = 0; bin < bins; ++bin) error += std::abs(correct[bin] - confidence[bin]);
  return error / static_cast<double>(chosen.size());
}

}  // namespace rlhf::ppo

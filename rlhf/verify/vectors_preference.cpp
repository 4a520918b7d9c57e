// Preference and reward-model losses.

#include <algorithm>
#include <map>

#include "rlhf/core/error.h"
#include "rlhf/ppo/preference_loss.h"
#include "rlhf/verify/golden_case.h"

namespace rlhf::verify {
namespace {

using namespace rlhf::ppo;

PreferenceKind trl_kind(const std::string& name) {
  static const std::map<std::string, PreferenceKind> kKinds = {{"sigmoid", PreferenceKind::kSigmoid},
                                                               {"ipo", PreferenceKind::kIpo},
                                                               {"robust", PreferenceKind::kRobust},
                                                               {"hinge", PreferenceKind::kHinge},
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
                                                               {"sft", PreferenceKind::kSft}};
  const auto it = kKinds.find(name);
  RLHF_CHECK(it != kKinds.end(), "loss_type '", name, "' is not known");
  return it->second;
}

PreferenceDivergence trl_divergence(const std::string& name) {
  static const std::map<std::string, PreferenceDivergence> kNames = {
      {"reverse_kl", PreferenceDivergence::kReverseKl},
      {"forward_kl", PreferenceDivergence::kForwardKl},
      {"js_divergence", PreferenceDivergence::kJensenShannon},
      {"alpha_divergence", PreferenceDivergence::kAlpha}};
  const auto it = kNames.find(name);
  RLHF_CHECK(it != kNames.end(), "f_divergence_type '", name, "' is not known");
  return it->second;
}

double mean(const std::vector<double>& values) {
  double sum = 0;
  for (const double value : values) sum += value;
  return sum / static_cast<double>(values.size());
}

std::vector<double> counting(const MatrixRows& rows, const std::vector<double>& values) {
  std::vector<double> kept;
  for (std::size_t t = 0; t < values.size(); ++t) {
    if (rows.view().counts(t)) kept.push_back(values[t]);
  }
  return kept;
}

// The mask has one column more than the log-probs: token t + 1 stands in column t.
MatrixRows shifted_rows(const Tensor& mask) {
  Tensor shifted;
  shifted.shape = {mask.shape.at(0), mask.shape.at(1) - 1};
  for (std::size_t row = 0; row < mask.shape[0]; ++row) {
    const auto bits = mask.row(row);
    RLHF_CHECK(bits[0] == 0, "completion_mask counts the first token of row ", row);
    shifted.values.insert(shifted.values.end(), bits.begin() + 1, bits.end());
  }
  return matrix_rows(shifted);
}

void check_dpo(GoldenCase& golden) {
  PreferenceOptions options;
  options.beta = golden.number("beta");
  options.label_smoothing = golden.number("label_smoothing", 0);
  options.divergence = trl_divergence(golden.text("f_divergence_type", "reverse_kl"));
  options.alpha = golden.number("f_alpha_divergence_coef", 0.5);
  options.discopop_tau = golden.number("discopop_tau", 0.05);
  options.length_desensitisation = golden.optional_number("ld_alpha");
  options.terms.clear();
  std::vector<double> weights;
  if (golden.has_param("loss_weights")) weights = read_tensor(golden.param("loss_weights")).values;
  for (const auto& name : golden.param("loss_type")) {
    const double weight = weights.empty() ? 1.0 : weights.at(options.terms.size());
    options.terms.push_back({trl_kind(name.get<std::string>()), weight});
  }
  const MatrixRows rows = shifted_rows(golden.input("completion_mask"));
  const std::vector<double> log_probs = golden.values("per_token_logps");
  const std::vector<double> chosen = golden.values("ref_chosen_logps");
  const std::vector<double> rejected = golden.values("ref_rejected_logps");
  const PreferenceResult result = preference_loss(options, {rows.view(), log_probs, chosen, rejected});
  // EXO's smoothing is a float32 number in the package.
  const bool exo = std::any_of(options.terms.begin(), options.terms.end(), [](const PreferenceTerm& term) {
    return term.kind == PreferenceKind::kExoPair;
  });
  const Tolerance tolerance = exo ? golden.at_least(1e-7) : golden.tolerance();
  golden.check("loss", result.loss, tolerance);
  // The package overwrites log-probs under the mask after the point where the gradient was read: what stands
  // there is the derivative of the sum, not of the loss.
  golden.compare("dloss_dper_token_logps", counting(rows, result.d_log_probs),
                 counting(rows, read_tensor(golden.output("dloss_dper_token_logps")).values), tolerance);
  golden.check("rewards_chosen_mean", mean(result.chosen_rewards), golden.at_least(1e-6));
  golden.check("rewards_rejected_mean", mean(result.rejected_rewards), golden.at_least(1e-6));
  golden.check("accuracy", result.accuracy, golden.at_least(1e-6));
}

void check_kto(GoldenCase& golden) {
  UnpairedOptions options;
  const std::string type = golden.text("loss_type");
  RLHF_CHECK(type == "kto" || type == "apo_zero_unpaired", "loss_type '", type, "' is not known");
  options.kind = type == "kto" ? UnpairedKind::kKto : UnpairedKind::kApoZero;
  options.beta = golden.number("beta");
  options.desirable_weight = golden.number("desirable_weight", 1);
  options.undesirable_weight = golden.number("undesirable_weight", 1);
  const Tensor log_probs = golden.input("per_token_logps");
  MatrixRows rows;
  for (std::size_t row = 0; row <= log_probs.shape.at(0); ++row)
    rows.offsets.push_back(row * log_probs.shape.at(1));
  const std::vector<double> reference = golden.values("ref_logps");
  std::vector<std::uint8_t> desirable;
  for (const double flag : golden.values("desirable")) desirable.push_back(flag != 0);
  std::vector<double> mismatched = golden.optional_values("kl_logps").value_or(std::vector<double>{});
  std::vector<double> mismatched_reference =
      golden.optional_values("ref_kl_logps").value_or(std::vector<double>{});
  if (!golden.flag("calculate_KL", true)) {
    mismatched.clear();
    mismatched_reference.clear();
  }
  const UnpairedResult result = unpaired_loss(
      options, {rows.view(), log_probs.values, reference, desirable, mismatched, mismatched_reference});
  golden.check("loss", result.loss);
  golden.check("dloss_dper_token_logps", result.d_log_probs);
  golden.check("kl", result.kl, golden.at_least(1e-6));
}

void check_reward_model_trl(GoldenCase& golden) {
  const std::vector<double> rewards = golden.values("rewards");
  const std::vector<double> margins = golden.optional_values("margin").value_or(std::vector<double>{});
  const std::span<const double> all(rewards);
  RewardModelLossOptions options;
  options.centring = golden.number("center_rewards_coefficient", 0);
  const RewardModelResult result =
      reward_model_loss(options, {all.first(rewards.size() / 2), all.last(rewards.size() / 2), margins});
  golden.check("loss", result.loss);
  std::vector<double> gradient = result.d_chosen;
  gradient.insert(gradient.end(), result.d_rejected.begin(), result.d_rejected.end());
  golden.check("dloss_drewards", gradient);
  golden.check("accuracy", result.accuracy, golden.at_least(1e-6));
  golden.check("margin", result.margin, golden.at_least(1e-6));
}

void check_reward_model_openrlhf(GoldenCase& golden) {
  const std::string loss = golden.text("loss");
  RLHF_CHECK(loss == "sigmoid" || loss == "sigmoid_margin" || loss == "logexp" || loss == "logexp_margin",
             "loss '", loss, "' is not known");
  RewardModelLossOptions options;
  options.kind = loss.rfind("logexp", 0) == 0 ? RewardModelKind::kLogExp : RewardModelKind::kSigmoid;
  const std::vector<double> chosen = golden.values("chosen_reward");
  const std::vector<double> rejected = golden.values("reject_reward");
  const std::vector<double> margins = golden.optional_values("margin").value_or(std::vector<double>{});
  const RewardModelResult result = reward_model_loss(options, {chosen, rejected, margins});
  golden.check("loss", result.loss);
  golden.check("dloss_dchosen", result.d_chosen);
  golden.check("dloss_drejected", result.d_rejected);
}

void check_dpo_openrlhf(GoldenCase& golden) {
  PreferenceOptions options;
  options.beta = golden.number("beta");
  options.label_smoothing = golden.number("label_smoothing");
  options.ipo_scale = IpoScale::kSum;
  options.terms = {{golden.flag("ipo") ? PreferenceKind::kIpo : PreferenceKind::kConservative, 1.0}};
  // Log-probs come summed: one position per response.
  std::vector<double> log_probs = golden.values("policy_chosen_logps");
  const std::vector<double> rejected = golden.values("policy_rejected_logps");
  const std::size_t pairs = log_probs.size();
  log_probs.insert(log_probs.end(), rejected.begin(), rejected.end());
  std::vector<std::size_t> offsets;
  for (std::size_t i = 0; i <= log_probs.size(); ++i) offsets.push_back(i);
  const std::vector<double> reference_chosen = golden.values("reference_chosen_logps");
  const std::vector<double> reference_rejected = golden.values("reference_rejected_logps");
  const PreferenceResult result =
      preference_loss(options, {{offsets, {}}, log_probs, reference_chosen, reference_rejected});
  golden.check("loss", result.loss);
  golden.check("dloss_dchosen", std::span(result.d_log_probs).first(pairs));
  golden.check("dloss_drejected", std::span(result.d_log_probs).last(pairs));
  golden.check("chosen_rewards", result.chosen_rewards);
  golden.check("rejected_rewards", result.rejected_rewards);
}

}  // namespace

void check_preference_loss(GoldenCase& golden, const nlohmann::json& source) {
  const std::string package = package_of(source);
  if (package == "openrlhf") {
    return golden.has_input("chosen_reward") ? check_reward_model_openrlhf(golden)
                                             : check_dpo_openrlhf(golden);
  }
  RLHF_CHECK(package == "trl", "package '", package, "' is not known");
  if (has_function(source, "DPOTrainer")) return check_dpo(golden);
  if (has_function(source, "KTOTrainer")) return check_kto(golden);
  if (has_function(source, "RewardTrainer")) return check_reward_model_trl(golden);
  fail<InvalidArgument>("none of the source's functions is known");
}

}  // namespace rlhf::verify

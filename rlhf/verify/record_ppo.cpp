// Trainer records of TRL's PPO: a whole run repeated from its checkpoints and its responses with this
// library's models, advantage stage, losses and optimizer. Only what random numbers decided is taken from the
// record: the responses, the order of the rows, and when the accelerator lets the optimizer step.

#include <algorithm>
#include <cmath>
#include <limits>

#include "rlhf/core/error.h"
#include "rlhf/verify/record_model.h"
#include "rlhf/verify/record_ppo_statistics.h"
#include "rlhf/verify/trl_options.h"

namespace rlhf::verify {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

template <class T>
class PpoRecord {
 public:
  explicit PpoRecord(GoldenCase& golden);
  void run();

 private:
  using Model = RecordModel<T>;
  using Place = PpoStatistics::Place;
  struct MicroBatch;

  void run_update(RecordObject& update, std::size_t number);
  void run_models(RecordObject& update, PpoRollout& rollout);
  void run_micro_batches(RecordObject& update, const PpoRollout& rollout, double learning_rate);
  void check_order(const std::vector<std::size_t>& order, std::size_t epoch);
  void train_policy(RecordObject& record, const PpoRollout& rollout, const MicroBatch& micro);
  void train_value(RecordObject& record, const PpoRollout& rollout, const MicroBatch& micro);
  void note_policy(const MicroBatch& micro, const ppo::PolicyLossResult& loss, std::size_t tokens,
                   std::size_t width);
  void note_entropy(const PpoRollout& rollout, const MicroBatch& micro, const std::vector<double>& entropies);
  void step(RecordObject& record, double learning_rate);
  void check_named_norms(RecordObject& record, const std::string& key,
                         const std::map<std::string, double>& policy,
                         const std::map<std::string, double>& value);
  void check_optimizer_description();

  GoldenCase& golden_;
  const PpoRecordOptions options_;
  const Tolerance tolerance_;
  const std::filesystem::path folder_;
  ThreadPool pool_{1};
  const Compute<T> compute_{pool_, kernels::detect_cpu_isa()};
  Model policy_, reference_, value_, reward_;
  PpoStatistics statistics_;
  std::vector<double> policy_losses_, value_losses_, losses_;  // of an update, per micro-batch
};

// Some rows of a rollout on their way through both models.
template <class T>
struct PpoRecord<T>::MicroBatch {
  std::vector<std::size_t> rows;
  Place place;
  SequenceBatch sequences;

  MicroBatch(const PpoRollout& rollout, std::vector<std::size_t> chosen, const Place& where)
      : rows(std::move(chosen)), place(where), sequences(select(rollout, rows)) {}

  static std::vector<RecordResponse> select(const PpoRollout& rollout, const std::vector<std::size_t>& rows) {
    std::vector<RecordResponse> responses;
    for (const std::size_t row : rows) {
      RLHF_CHECK(row < rollout.responses.size(), "row ", row, " does not exist");
      responses.push_back(rollout.responses[row]);
    }
    return responses;
  }
};

// Rows of the hidden states that the value head reads.
std::vector<std::int64_t> value_rows(const SequenceBatch& sequences, const PaddedRows& slots) {
  std::vector<std::int64_t> rows;
  for (std::size_t s = 0; s < slots.rows(); ++s)
    for (std::size_t t = 0; t < slots.length(s); ++t) rows.push_back(sequences.row_before(s, t));
  return rows;
}

template <class T>
PpoRecord<T>::PpoRecord(GoldenCase& golden)
    : golden_(golden),
      options_(read_ppo_record_options(golden)),
      tolerance_(record_tolerance(golden)),
      folder_(golden.directory() / golden.text("checkpoints")),
      policy_(folder_ / "policy", options_.algorithm.optimizer, compute_),
      reference_(folder_ / "ref", options_.algorithm.optimizer, compute_),
      value_(folder_ / "value", options_.algorithm.optimizer, compute_),
      reward_(folder_ / "reward", options_.algorithm.optimizer, compute_),
      statistics_(options_) {}

template <class T>
void PpoRecord<T>::run() {
  check_optimizer_description();
  std::vector<RecordObject> updates = record_objects(golden_, golden_.output("updates"), "updates");
  RLHF_CHECK(updates.size() == options_.updates, "the record has ", updates.size(),
             " updates, num_total_batches is ", options_.updates);
  for (std::size_t i = 0; i < updates.size(); ++i) run_update(updates[i], i);
  policy_.compare_weights(golden_, folder_ / "policy_after", tolerance_);
  value_.compare_weights(golden_, folder_ / "value_after", tolerance_);
}

template <class T>
void PpoRecord<T>::run_update(RecordObject& update, std::size_t number) {
  const OptimizerOptions& optimizer = options_.algorithm.optimizer;
  const double learning_rate =
      optimizer.learning_rate * learning_rate_factor(optimizer.schedule, number, options_.updates);
  update.check("lr", learning_rate, kRateTolerance);
  std::set<std::vector<TokenId>> prompts;
  for (const nlohmann::json& query : golden_.raw_input("dataset_queries"))
    prompts.insert(query.get<std::vector<TokenId>>());
  PpoRollout rollout = read_ppo_rollout(update, options_, prompts);
  run_models(update, rollout);
  check_ppo_experience(update, options_, tolerance_, rollout);
  run_micro_batches(update, rollout, learning_rate);
  statistics_.check_tables(update, tolerance_);
  statistics_.check_metrics(update, rollout, learning_rate, number + 1, tolerance_);
  update.finish();
}

template <class T>
void PpoRecord<T>::run_models(RecordObject& update, PpoRollout& rollout) {
  const SequenceBatch sequences(rollout.responses);
  const auto check_visible = [&](const char* key, const PaddedRows& rows, const std::vector<double>& flat) {
    golden_.compare(update.label() + "." + key, flat, rows.strip(update.tensor(key)), tolerance_);
  };
  policy_.forward(sequences, Model::Use::kScore);
  rollout.log_probs = policy_.token_outputs(sequences, options_.temperature).log_probs;
  check_visible("logprobs_before_mask", rollout.visible, rollout.log_probs);
  reference_.forward(sequences, Model::Use::kScore);
  rollout.reference_log_probs = reference_.token_outputs(sequences, options_.temperature).log_probs;
  check_visible("ref_logprobs_before_mask", rollout.visible, rollout.reference_log_probs);

  value_.forward(sequences, Model::Use::kScore);
  const std::vector<double> values = value_.scalar_outputs(value_rows(sequences, rollout.visible));
  check_visible("values_before_mask", rollout.visible, values);
  rollout.values = rollout.slots.narrow(rollout.visible, values);

  // The reward model judges the truncated response, at its last token.
  std::vector<std::int64_t> last;
  for (std::size_t s = 0; s < rollout.tokens.rows(); ++s)
    last.push_back(sequences.row_before(s, rollout.tokens.length(s)));
  reward_.forward(sequences, Model::Use::kScore);
  rollout.scores = reward_.scalar_outputs(last);
  update.check("scores_before_penalty", rollout.scores, tolerance_);
}

template <class T>
void PpoRecord<T>::check_order(const std::vector<std::size_t>& order, std::size_t epoch) {
  std::vector<std::size_t> sorted = order;
  std::sort(sorted.begin(), sorted.end());
  bool complete = sorted.size() == options_.batch;
  for (std::size_t i = 0; complete && i < sorted.size(); ++i) complete = sorted[i] == i;
  if (!complete) golden_.fail_with(concat("epoch ", epoch, " does not take every row once"));
}

template <class T>
void PpoRecord<T>::run_micro_batches(RecordObject& update, const PpoRollout& rollout, double learning_rate) {
  std::vector<RecordObject> records = update.members("micro_batches");
  const std::size_t per_mini_batch = (options_.mini_batch - 1) / options_.micro_batch + 1;
  const std::size_t per_epoch = per_mini_batch * options_.mini_batches;
  RLHF_CHECK(records.size() == options_.epochs * per_epoch, update.label(), " has ", records.size(),
             " micro-batches, expected ", options_.epochs * per_epoch);
  std::vector<std::size_t> order;
  policy_losses_.clear();
  value_losses_.clear();
  losses_.clear();
  for (std::size_t i = 0; i < records.size(); ++i) {
    RecordObject& record = records[i];
    const Place place{i / per_epoch, i % per_epoch / per_mini_batch, i % per_mini_batch};
    record.check_exact("ppo_epoch", static_cast<double>(place.epoch));
    record.check_exact("minibatch", static_cast<double>(place.mini_batch));
    const auto rows = record.raw("indices").get<std::vector<std::size_t>>();
    RLHF_CHECK(!rows.empty() && rows.size() <= options_.micro_batch, record.label(), " has ", rows.size(),
               " rows, expected at most ", options_.micro_batch);
    order.insert(order.end(), rows.begin(), rows.end());
    const MicroBatch micro(rollout, rows, place);
    train_policy(record, rollout, micro);
    train_value(record, rollout, micro);
    losses_.push_back(policy_losses_.back() + options_.algorithm.value.coefficient * value_losses_.back());
    step(record, learning_rate);
    for (const char* key : {"pg_loss", "vf_loss", "loss"}) record.ignore(key);  // compared below
    record.finish();
    if ((i + 1) % per_epoch != 0) continue;
    check_order(order, place.epoch);
    order.clear();
  }
  // Scalars of one kind share a scale: some are differences of larger numbers.
  update.check_each("micro_batches", "pg_loss", policy_losses_, tolerance_);
  update.check_each("micro_batches", "vf_loss", value_losses_, tolerance_);
  update.check_each("micro_batches", "loss", losses_, tolerance_);
}

template <class T>
void PpoRecord<T>::train_policy(RecordObject& record, const PpoRollout& rollout, const MicroBatch& micro) {
  const PaddedRows visible = rollout.visible.select(micro.rows), tokens = rollout.tokens.select(micro.rows);
  policy_.forward(micro.sequences, Model::Use::kTrain);
  const auto outputs = policy_.token_outputs(micro.sequences, options_.temperature);
  const std::vector<double> log_probs = tokens.narrow(visible, outputs.log_probs);
  const ppo::Experience& e = rollout.experience;
  const std::vector<double> old_log_probs = rollout.tokens.take(e.old_log_probs, micro.rows);
  const std::vector<double> advantages = rollout.tokens.take(e.advantages, micro.rows);
  ppo::PolicyLossInputs inputs;
  inputs.rows = {tokens.offsets, {}};
  inputs.log_probs = log_probs;
  inputs.old_log_probs = old_log_probs;
  inputs.advantages = advantages;
  inputs.context.micro_batches = static_cast<double>(options_.accumulation);
  const ppo::PolicyLossResult loss = ppo::policy_loss(options_.algorithm.policy, inputs);

  const std::size_t count = tokens.offsets.back();
  // A mean over no position is 0 / 0 in TRL, and so is its gradient; nothing of it reaches the weights.
  const double none = count == 0 ? kNan : 0;
  record.check("new_logprobs", tokens.pad(log_probs, 1), tolerance_);
  record.check("dscaledloss_dnew_logprobs", tokens.pad(loss.d_log_probs, none), tolerance_);
  policy_losses_.push_back(loss.policy_loss * inputs.context.micro_batches + none);
  note_policy(micro, loss, count, tokens.width);
  note_entropy(rollout, micro, outputs.entropies);
  policy_.backward_tokens(micro.sequences, options_.temperature, visible.widen(tokens, loss.d_log_probs), {});
}

template <class T>
void PpoRecord<T>::note_policy(const MicroBatch& micro, const ppo::PolicyLossResult& loss, std::size_t tokens,
                               std::size_t width) {
  // TRL's drift metrics are means over the padded matrix, where padding has log-ratio 0 and ratio 1.
  const double all = static_cast<double>(micro.rows.size() * width);
  const double share = static_cast<double>(tokens) / all;
  statistics_.put("approxkl", micro.place, share * loss.metrics.approx_kl_k2);
  statistics_.put("ratio", micro.place, share * loss.metrics.ratio_mean + (1 - share));
  statistics_.put("pg_clipfrac", micro.place, tokens == 0 ? kNan : loss.metrics.clip_fraction);
  statistics_.put("pg_loss", micro.place, policy_losses_.back());
}

template <class T>
void PpoRecord<T>::note_entropy(const PpoRollout& rollout, const MicroBatch& micro,
                                const std::vector<double>& entropies) {
  // The mean runs over all columns, also those behind padding tokens (see PpoRollout::visible).
  if (entropies.size() < micro.rows.size() * rollout.visible.width)
    return statistics_.put_unknown("entropy", micro.place);
  double sum = 0;
  for (const double entropy : entropies) sum += entropy;
  statistics_.put("entropy", micro.place, sum / static_cast<double>(entropies.size()));
}

template <class T>
void PpoRecord<T>::train_value(RecordObject& record, const PpoRollout& rollout, const MicroBatch& micro) {
  const PaddedRows slots = rollout.slots.select(micro.rows);
  const std::vector<std::int64_t> rows = value_rows(micro.sequences, slots);
  value_.forward(micro.sequences, Model::Use::kTrain);
  const std::vector<double> values = value_.scalar_outputs(rows);
  const ppo::Experience& e = rollout.experience;
  const std::vector<double> old_values = rollout.slots.take(e.old_values, micro.rows);
  const std::vector<double> returns = rollout.slots.take(e.returns, micro.rows);
  ppo::ValueLossInputs inputs{{slots.offsets, {}}, values, old_values, returns, {}};
  ppo::ValueLossOptions unweighted = options_.algorithm.value;
  unweighted.coefficient = 1;
  const ppo::ValueLossResult plain = ppo::value_loss(unweighted, inputs);
  inputs.context.micro_batches = static_cast<double>(options_.accumulation);
  const ppo::ValueLossResult loss = ppo::value_loss(options_.algorithm.value, inputs);

  record.check("vpred", slots.pad(values, 0), tolerance_);
  record.check("dscaledloss_dvpred", slots.pad(loss.d_values, 0), tolerance_);
  record.check("vf_clipfrac", plain.clip_fraction, golden_.at_least(1e-6));  // float32 in TRL
  value_losses_.push_back(plain.loss);
  statistics_.put("vf_loss", micro.place, plain.loss);
  statistics_.put("vf_clipfrac", micro.place, plain.clip_fraction);
  value_.backward_scalars(micro.sequences, rows, loss.d_values);
}

// Both models share one optimizer in TRL. It clips nothing, so two with the same options do the same.
template <class T>
void PpoRecord<T>::step(RecordObject& record, double learning_rate) {
  const bool now = record.number("optimizer_steps_now") != 0;
  if (!now) {
    if (!record.raw("accumulated_grad_norms").empty()) record.fail_with("gradient norms without a step");
    return;
  }
  check_named_norms(record, "accumulated_grad_norms", policy_.gradient_norms("policy."),
                    value_.gradient_norms("value_model."));
  policy_.step(learning_rate);
  value_.step(learning_rate);
  check_named_norms(record, "param_l2_after_step", policy_.weight_norms("policy."),
                    value_.weight_norms("value_model."));
}

template <class T>
void PpoRecord<T>::check_named_norms(RecordObject& record, const std::string& key,
                                     const std::map<std::string, double>& policy,
                                     const std::map<std::string, double>& value) {
  std::map<std::string, double> norms = policy;
  for (const auto& [name, norm] : value) {
    // TRL's wrapper holds the value model's backbone a second time, and may list it under that name.
    const std::string prefix = "value_model.";
    const std::size_t inner = name.find('.', prefix.size());
    const std::string backbone = "critic_backbone." + name.substr(inner + 1);
    norms[record.raw(key).contains(backbone) ? backbone : name] = norm;
  }
  record.check_named(key, norms, tolerance_.relative);
}

template <class T>
void PpoRecord<T>::check_optimizer_description() {
  RecordObject description(golden_, golden_.output("optimizer"), "optimizer");
  const OptimizerOptions& o = options_.algorithm.optimizer;
  if (description.text("class") != "AdamW") description.fail_with("class is not known");
  const std::vector<double> betas = {o.beta1, o.beta2};
  description.check("betas", betas, kRateTolerance);
  description.check("eps", o.epsilon, kRateTolerance);
  description.check("initial_lr", o.learning_rate, kRateTolerance);
  description.check("weight_decay", o.weight_decay, kRateTolerance);
  description.check_exact("amsgrad", 0);
  description.check_exact("maximize", 0);
  description.check_exact("decoupled_weight_decay", 1);
  // How torch runs it, which changes no result; lr is the rate of the moment the record was taken.
  for (const char* key : {"foreach", "capturable", "differentiable", "fused", "lr"}) description.ignore(key);
  description.finish();
  golden_.check("num_param_groups", 2, {0, 0});  // with and without weight decay
}

}  // namespace

void check_ppo_record(GoldenCase& golden, const nlohmann::json& source) {
  RLHF_CHECK(package_of(source) == "trl" && has_function(source, "PPOTrainer.train"),
             "this kind of PPO record is not known");
  if (golden.is_float32()) {
    PpoRecord<float>(golden).run();
  } else {
    PpoRecord<double>(golden).run();
  }
}

}  // namespace rlhf::verify

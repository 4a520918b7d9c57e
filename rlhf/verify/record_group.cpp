// Trainer records of TRL's GRPO and RLOO: a whole run repeated from its checkpoint with this library's
// models, group advantages, losses and optimizer. Taken from the record: the completions and their rewards,
// and the rows of each micro-batch.

#include <algorithm>
#include <cmath>
#include <optional>

#include "rlhf/core/error.h"
#include "rlhf/kernels/adamw.h"
#include "rlhf/verify/record_group_rollout.h"
#include "rlhf/verify/record_model.h"
#include "rlhf/verify/trl_options.h"

namespace rlhf::verify {
namespace {

template <class T>
class GroupRecord {
 public:
  explicit GroupRecord(GoldenCase& golden);
  void run();

 private:
  using Model = RecordModel<T>;

  void roll_out(RecordObject& event);
  void train(RecordObject& event, std::size_t window);
  void check_loss(RecordObject& event, const GroupMicroBatch& micro, const ppo::PolicyLossResult& loss,
                  double divisor);
  void step(RecordObject& event);
  double learning_rate() const;
  std::size_t window_from(const std::vector<RecordObject>& events, std::size_t begin) const;

  GoldenCase& golden_;
  const GroupRecordOptions options_;
  const Tolerance tolerance_;
  const std::filesystem::path folder_;
  ThreadPool pool_{1};
  const Compute<T> compute_{pool_, kernels::detect_cpu_isa()};
  Model policy_, reference_;
  std::optional<GroupRollout> rollout_;
  std::size_t steps_ = 0, micro_batches_ = 0;
};

template <class T>
GroupRecord<T>::GroupRecord(GoldenCase& golden)
    : golden_(golden),
      options_(read_group_record_options(golden)),
      tolerance_(record_tolerance(golden)),
      folder_(golden.directory() / golden.text("checkpoints")),
      policy_(folder_ / "policy", options_.optimizer, compute_),
      reference_(folder_ / "policy", options_.optimizer, compute_) {}

// Micro-batches up to the next optimizer step: what TRL divides by.
template <class T>
std::size_t GroupRecord<T>::window_from(const std::vector<RecordObject>& events, std::size_t begin) const {
  std::size_t window = 0;
  for (std::size_t i = begin; i < events.size(); ++i) {
    RecordObject event = events[i];
    const std::string kind = event.text("kind");
    if (kind == "optimizer_step") break;
    window += kind == "loss";
  }
  RLHF_CHECK(window <= options_.accumulation, window, " micro-batches before an optimizer step, expected ",
             options_.accumulation);
  return window;
}

template <class T>
void GroupRecord<T>::run() {
  std::vector<RecordObject> events = record_objects(golden_, golden_.output("events"), "events");
  std::size_t window = 0;
  bool new_window = true;
  for (std::size_t i = 0; i < events.size(); ++i) {
    const std::string kind = events[i].text("kind");
    if (kind == "rollout") {
      roll_out(events[i]);
    } else if (kind == "loss") {
      if (new_window) window = window_from(events, i);
      new_window = false;
      train(events[i], window);
    } else if (kind == "optimizer_step") {
      step(events[i]);
      new_window = true;
    } else {
      fail<InvalidArgument>(events[i].label(), ": kind '", kind, "' is not known");
    }
    events[i].finish();
  }
  if (steps_ != options_.max_steps)
    golden_.fail_with(concat(steps_, " optimizer steps, expected ", options_.max_steps));
  policy_.compare_weights(golden_, folder_ / "policy_after", tolerance_);
}

template <class T>
double GroupRecord<T>::learning_rate() const {
  return options_.optimizer.learning_rate *
         learning_rate_factor(options_.optimizer.schedule, steps_, options_.max_steps);
}

template <class T>
void GroupRecord<T>::roll_out(RecordObject& event) {
  rollout_ = read_group_rollout(event, options_);
  // TRL counts positions from the first padding token here. Rotations do not notice, learned positions do.
  RLHF_CHECK(!rollout_->padded_prompts || !policy_.config().learned_positions, event.label(),
             ": padded prompts of a model with learned positions are not known");
  const SequenceBatch sequences(rollout_->responses);
  policy_.forward(sequences, Model::Use::kScore);
  rollout_->log_probs = policy_.token_outputs(sequences, options_.temperature).log_probs;
  reference_.forward(sequences, Model::Use::kScore);
  rollout_->reference_log_probs = reference_.token_outputs(sequences, options_.temperature).log_probs;
  check_group_rollout(golden_, event, options_, tolerance_, *rollout_);
  micro_batches_ = 0;
}

template <class T>
void GroupRecord<T>::train(RecordObject& event, std::size_t window) {
  RLHF_CHECK(rollout_, event.label(), ": a loss before any rollout");
  RLHF_CHECK(micro_batches_ < options_.steps_per_generation * options_.iterations, event.label(),
             ": the rollout has been used up");
  event.check("learning_rate", learning_rate(), kRateTolerance);
  // Every pass over a rollout takes each of its rows once.
  if (micro_batches_++ % options_.steps_per_generation == 0) rollout_->unused.assign(options_.batch, 1);
  GroupMicroBatch micro = read_group_micro_batch(event, options_, tolerance_, *rollout_);
  const SequenceBatch sequences(micro.responses);
  policy_.forward(sequences, Model::Use::kTrain);
  const auto outputs = policy_.token_outputs(sequences, options_.temperature);
  micro.log_probs = outputs.log_probs;
  golden_.compare(event.label() + ".per_token_logps", outputs.log_probs,
                  micro.tokens.strip(event.tensor("per_token_logps")), tolerance_);
  golden_.compare(event.label() + ".entropies", outputs.entropies,
                  micro.tokens.strip(event.tensor("entropies")), tolerance_);

  ppo::PolicyLossInputs inputs;
  inputs.rows = {micro.tokens.offsets, {}};
  inputs.log_probs = outputs.log_probs;
  // Without old log-probs in the record TRL takes the new ones, without their gradient.
  inputs.old_log_probs = rollout_->has_old_log_probs ? micro.old_log_probs : outputs.log_probs;
  inputs.reference_log_probs = micro.reference_log_probs;
  inputs.advantages = micro.advantages;
  inputs.entropies = outputs.entropies;
  TrlMicroBatch scope;
  scope.rows = static_cast<double>(micro.rows.size());
  scope.accumulation = static_cast<double>(window);
  scope.steps_per_generation = static_cast<double>(options_.steps_per_generation);
  scope.tokens = static_cast<double>(rollout_->tokens.offsets.back());
  inputs.context = trl_loss_context(options_.loss_type, scope);
  const ppo::PolicyLossResult loss = ppo::policy_loss(options_.algorithm.policy, inputs);
  // RLOO's loss is recorded before the trainer divides it.
  check_loss(event, micro, loss, options_.rloo ? scope.accumulation : 1);
  policy_.backward_tokens(sequences, options_.temperature, loss.d_log_probs, loss.d_entropies);
}

template <class T>
void GroupRecord<T>::check_loss(RecordObject& event, const GroupMicroBatch& micro,
                                const ppo::PolicyLossResult& loss, double divisor) {
  check_group_terms(golden_, event, options_, tolerance_, micro, loss);
  // A sum of terms of either sign, which may nearly cancel: its rounding has the scale of the terms.
  double scale = 1;
  for (const double term : loss.token_losses) scale = std::max(scale, std::abs(term));
  event.check("loss", loss.loss * divisor + untrained_loss(options_, micro),
              {tolerance_.relative, tolerance_.relative * scale});
}

template <class T>
void GroupRecord<T>::step(RecordObject& event) {
  event.check("learning_rate", learning_rate(), kRateTolerance);
  std::map<std::string, double> gradients = policy_.gradient_norms("");
  const double norm = policy_.step(learning_rate());
  event.check("global_grad_norm_before_clipping", norm, tolerance_);
  const double scale = clip_scale(norm, options_.optimizer.max_grad_norm);
  for (auto& [name, gradient] : gradients) gradient *= scale;
  event.check_named("grad_norms_after_clipping", gradients, tolerance_.relative);
  event.check_named("param_l2_after_step", policy_.weight_norms(""), tolerance_.relative);
  ++steps_;
}

}  // namespace

void check_group_record(GoldenCase& golden, const nlohmann::json& source) {
  RLHF_CHECK(
      package_of(source) == "trl" &&
          has_function(source, golden.has_param("loss_type") ? "GRPOTrainer.train" : "RLOOTrainer.train"),
      "this kind of group record is not known");
  if (golden.is_float32()) {
    GroupRecord<float>(golden).run();
  } else {
    GroupRecord<double>(golden).run();
  }
}

}  // namespace rlhf::verify

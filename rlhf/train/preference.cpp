#include "rlhf/train/preference.h"

#include "rlhf/core/error.h"

namespace rlhf {
namespace {

std::vector<const TrainingPair*> pointers(const std::vector<TrainingPair>& pairs) {
  std::vector<const TrainingPair*> out;
  for (const TrainingPair& pair : pairs) out.push_back(&pair);
  return out;
}

void check_side(const TrainingExample& example, const char* set, std::size_t number, const char* side,
                std::int64_t context) {
  RLHF_CHECK(count_loss_tokens(example) > 0, "preference: ", set, " pair ", number, ": the ", side,
             " response has no token to learn from");
  RLHF_CHECK(static_cast<std::int64_t>(example.tokens.size()) <= context, "preference: ", set, " pair ",
             number, ": the ", side, " side has ", example.tokens.size(), " tokens, the model's context is ",
             context);
}

void check_pairs(const std::vector<TrainingPair>& pairs, const char* set, std::int64_t context) {
  for (std::size_t i = 0; i < pairs.size(); ++i) {
    check_side(pairs[i].chosen, set, i + 1, "chosen", context);
    check_side(pairs[i].rejected, set, i + 1, "rejected", context);
  }
}

}  // namespace

PreferenceStage::PreferenceStage(LanguageModel& policy, const TaskData& data,
                                 const PreferenceStageOptions& options, const StageContext& context)
    : options_(options),
      context_(context),
      policy_(policy.parameters()),
      data_(data),
      pass_(policy.config(), context.compute),
      loss_(options.loss, options.max_tokens_per_micro_batch, pass_) {
  RLHF_CHECK(!data.train_pairs.empty(), "preference: there are no pairs");
  check_pairs(data.train_pairs, "training", policy.config().max_positions);
  check_pairs(data.held_out_pairs, "held-out", policy.config().max_positions);
  held_out_ = loss_.refer(pointers(data.held_out_pairs), policy_.weights());
}

void PreferenceStage::run() {
  const PairBatch all = loss_.refer(pointers(data_.train_pairs), policy_.weights());
  StepPlan plan{"preference"};
  plan.num_items = all.pairs.size();
  plan.items_per_step = options_.pairs_per_step;
  plan.epochs = options_.epochs;
  plan.max_steps = options_.max_steps;
  plan.optimizer = options_.optimizer;
  run_steps(policy_, plan, context_, [&](const std::vector<std::size_t>& items, std::int64_t) {
    PairBatch batch;
    StepMeasure measure;
    for (std::size_t item : items) {
      batch.pairs.push_back(all.pairs[item]);
      measure.tokens += static_cast<std::int64_t>(all.pairs[item]->chosen.tokens.size() +
                                                  all.pairs[item]->rejected.tokens.size());
      if (all.reference_chosen.empty()) continue;
      batch.reference_chosen.push_back(all.reference_chosen[item]);
      batch.reference_rejected.push_back(all.reference_rejected[item]);
    }
    const PairMeasure pairs = loss_.train(batch, policy_.weights());
    measure.loss = pairs.loss;
    measure.metrics = pairs.metrics();
    return measure;
  });
}

PairMeasure PreferenceStage::judge_held_out() {
  return loss_.measure(held_out_, policy_.weights());
}

}  // namespace rlhf

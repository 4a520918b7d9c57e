#include "rlhf/train/preference.h"

#include "rlhf/core/error.h"

namespace rlhf {
namespace {

template <class T>
std::vector<const T*> pointers(const std::vector<T>& items) {
  std::vector<const T*> out;
  for (const T& item : items) out.push_back(&item);
  return out;
}

void check_example(const TrainingExample& example, const std::string& name, std::int64_t context) {
  RLHF_CHECK(count_loss_tokens(example) > 0, "preference: ", name, " has no token to learn from");
  RLHF_CHECK(static_cast<std::int64_t>(example.tokens.size()) <= context, "preference: ", name, " has ",
             example.tokens.size(), " tokens with its prompt, the model's context is ", context);
}

void check_pairs(const std::vector<TrainingPair>& pairs, const char* set, std::int64_t context) {
  for (std::size_t i = 0; i < pairs.size(); ++i) {
    check_example(pairs[i].chosen, concat("the chosen response of ", set, " pair ", i + 1), context);
    check_example(pairs[i].rejected, concat("the rejected response of ", set, " pair ", i + 1), context);
  }
}

// The data's labelled examples, or the sides of its pairs.
std::vector<LabelledExample> labelled_examples(const TaskData& data) {
  if (!data.labelled.empty()) return data.labelled;
  std::vector<LabelledExample> labelled;
  for (const TrainingPair& pair : data.train_pairs) labelled.push_back({pair.chosen, true});
  for (const TrainingPair& pair : data.train_pairs) labelled.push_back({pair.rejected, false});
  return labelled;
}

// The implicit reward of KTO is that of DPO.
ppo::PreferenceOptions pair_loss_options(const PreferenceStageOptions& options) {
  if (!options.unpaired) return options.loss;
  ppo::PreferenceOptions loss;
  loss.beta = options.unpaired->beta;
  return loss;
}

std::int64_t num_tokens(const TrainingExample& example) {
  return static_cast<std::int64_t>(example.tokens.size());
}

}  // namespace

PreferenceStage::PreferenceStage(LanguageModel& policy, const TaskData& data,
                                 const PreferenceStageOptions& options, const StageContext& context)
    : options_(options),
      context_(context),
      policy_(policy.parameters()),
      data_(data),
      pass_(policy.config(), context.compute, context.recompute),
      loss_(pair_loss_options(options), {options.max_tokens_per_micro_batch, context.collective}, pass_) {
  const std::int64_t longest = policy.config().max_positions;
  check_pairs(data.train_pairs, "training", longest);
  check_pairs(data.held_out_pairs, "held-out", longest);
  if (!options.unpaired) {
    RLHF_CHECK(!data.train_pairs.empty(), "preference: there are no pairs");
  } else {
    labelled_ = labelled_examples(data);
    RLHF_CHECK(!labelled_.empty(), "preference: there are neither labelled responses nor pairs");
    for (std::size_t i = 0; i < data.labelled.size(); ++i)
      check_example(data.labelled[i].example, concat("labelled response ", i + 1), longest);
    if (options.unpaired->kind == ppo::UnpairedKind::kKto) mismatched_ = make_mismatched(labelled_, longest);
  }
  held_out_ = loss_.refer(pointers(data.held_out_pairs), policy_.weights());
}

void PreferenceStage::run() {
  TrainingPlan plan{"preference"};
  plan.num_items = options_.unpaired ? labelled_.size() : data_.train_pairs.size();
  plan.items_per_step = options_.unpaired ? 2 * options_.pairs_per_step : options_.pairs_per_step;
  plan.epochs = options_.epochs;
  plan.max_steps = options_.max_steps;
  plan.optimizer = options_.optimizer;
  options_.unpaired ? run_unpaired(plan) : run_pairs(plan);
}

void PreferenceStage::run_pairs(const TrainingPlan& plan) {
  const PairBatch all = loss_.refer(pointers(data_.train_pairs), policy_.weights());
  run_steps(policy_, plan, context_, [&](const std::vector<std::size_t>& items, std::int64_t) {
    PairBatch batch;
    StepMeasure measure;
    for (std::size_t item : items) {
      batch.pairs.push_back(all.pairs[item]);
      measure.tokens += num_tokens(all.pairs[item]->chosen) + num_tokens(all.pairs[item]->rejected);
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

void PreferenceStage::run_unpaired(const TrainingPlan& plan) {
  UnpairedLoss loss(*options_.unpaired, {options_.max_tokens_per_micro_batch, context_.collective}, pass_);
  const LabelledBatch all = loss.refer(pointers(labelled_), pointers(mismatched_), policy_.weights());
  run_steps(policy_, plan, context_, [&](const std::vector<std::size_t>& items, std::int64_t) {
    LabelledBatch batch;
    StepMeasure measure;
    for (std::size_t item : items) {
      batch.examples.push_back(all.examples[item]);
      batch.reference.push_back(all.reference[item]);
      measure.tokens += num_tokens(all.examples[item]->example);
      if (all.mismatched.empty()) continue;
      batch.mismatched.push_back(all.mismatched[item]);
      batch.mismatched_reference.push_back(all.mismatched_reference[item]);
      measure.tokens += num_tokens(*all.mismatched[item]);
    }
    const LabelledMeasure labelled = loss.train(batch, policy_.weights());
    measure.loss = labelled.loss;
    measure.metrics = labelled.metrics();
    return measure;
  });
}

PairMeasure PreferenceStage::judge_held_out() {
  return loss_.measure(held_out_, policy_.weights());
}

}  // namespace rlhf

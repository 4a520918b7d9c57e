#include "rlhf/train/unpaired.h"

#include <algorithm>
#include <optional>

#include "rlhf/core/error.h"

namespace rlhf {
namespace {

ExampleBatch examples_of(const std::vector<const LabelledExample*>& labelled) {
  ExampleBatch batch;
  for (const LabelledExample* example : labelled) batch.examples.push_back(&example->example);
  return batch;
}

// Number of tokens before the first one with loss.
std::size_t prompt_length(const TrainingExample& example) {
  return static_cast<std::size_t>(std::ranges::find(example.loss_mask, 1) - example.loss_mask.begin());
}

bool have_one_prompt(const TrainingExample& a, const TrainingExample& b) {
  const std::size_t length = prompt_length(a);
  return length == prompt_length(b) &&
         std::equal(a.tokens.begin(), a.tokens.begin() + static_cast<std::ptrdiff_t>(length),
                    b.tokens.begin());
}

// The prompt of `a` with the response of `b`, or nothing when that answers `a` or is too long.
std::optional<TrainingExample> mismatch(const TrainingExample& a, const TrainingExample& b,
                                        std::int64_t max_tokens) {
  const auto own = static_cast<std::ptrdiff_t>(prompt_length(a)),
             other = static_cast<std::ptrdiff_t>(prompt_length(b));
  if (have_one_prompt(a, b) || own + std::ssize(b.tokens) - other > max_tokens) return {};
  TrainingExample mixed{{a.tokens.begin(), a.tokens.begin() + own},
                        std::vector<std::uint8_t>(static_cast<std::size_t>(own), 0)};
  mixed.tokens.insert(mixed.tokens.end(), b.tokens.begin() + other, b.tokens.end());
  mixed.loss_mask.insert(mixed.loss_mask.end(), b.loss_mask.begin() + other, b.loss_mask.end());
  return mixed;
}

}  // namespace

void LabelledMeasure::add_ranks(Collective& collective) {
  if (collective.world_size() == 1) return;
  // The reference point is the same on all ranks that have a response.
  const double has_any = desirable + undesirable > 0;
  double all[] = {loss,
                  has_any * kl,
                  has_any,
                  static_cast<double>(desirable),
                  static_cast<double>(undesirable),
                  desirable_rewards,
                  undesirable_rewards};
  collective.all_reduce(std::span(all));
  *this = {all[0], all[1] / all[2], static_cast<std::size_t>(all[3]), static_cast<std::size_t>(all[4]),
           all[5], all[6]};
}

Metrics LabelledMeasure::metrics() const {
  Metrics metrics = {{"kl", kl}};
  const double good = desirable_rewards / static_cast<double>(desirable),
               bad = undesirable_rewards / static_cast<double>(undesirable);
  if (desirable > 0 && undesirable > 0) metrics.emplace_back("margin", good - bad);
  if (desirable > 0) metrics.emplace_back("desirable_reward", good);
  if (undesirable > 0) metrics.emplace_back("undesirable_reward", bad);
  return metrics;
}

std::vector<TrainingExample> make_mismatched(const std::vector<LabelledExample>& examples,
                                             std::int64_t max_tokens) {
  std::vector<TrainingExample> mismatched;
  const std::size_t n = examples.size();
  for (std::size_t i = 0; i < n; ++i) {
    std::optional<TrainingExample> found;
    for (std::size_t back = 1; back < n && !found; ++back)
      found = mismatch(examples[i].example, examples[(i + n - back) % n].example, max_tokens);
    RLHF_CHECK(found,
               "preference.unpaired: kto measures the policy on prompts with responses to other prompts, "
               "and example ",
               i + 1, " of ", n, " finds none that fits the model's context of ", max_tokens,
               " tokens; give examples of several prompts, or take the kind apo_zero_unpaired");
    mismatched.push_back(std::move(*found));
  }
  return mismatched;
}

LabelledBatch UnpairedLoss::refer(const std::vector<const LabelledExample*>& examples,
                                  const std::vector<const TrainingExample*>& mismatched,
                                  const DecoderWeights<float>& reference) {
  LabelledBatch batch{examples, {}, mismatched, {}};
  batch.reference = compute_log_probs(pass_, reference, examples_of(examples), setting_).row_sums();
  if (!mismatched.empty())
    batch.mismatched_reference = compute_log_probs(pass_, reference, {mismatched, 1}, setting_).row_sums();
  return batch;
}

LabelledMeasure UnpairedLoss::train(const LabelledBatch& batch, const DecoderWeights<float>& policy) {
  std::vector<double> mismatched;
  if (!batch.mismatched.empty())
    mismatched = compute_log_probs(pass_, policy, {batch.mismatched, 1}, setting_).row_sums();
  LabelledMeasure measure;
  const double share = 1 / static_cast<double>(batch.examples.size());
  const auto loss = [&](const TokenLogProbs& log_probs) {
    std::vector<double> reference;
    std::vector<std::uint8_t> desirable;
    const auto sums = log_probs.row_sums();
    for (std::size_t i = 0; i < log_probs.items.size(); ++i) {
      const std::size_t item = log_probs.items[i];
      reference.push_back(batch.reference[item]);
      desirable.push_back(batch.examples[item]->desirable);
      const double reward = options_.beta * (sums[i] - reference.back());
      (desirable.back() ? measure.desirable_rewards : measure.undesirable_rewards) += reward;
      ++(desirable.back() ? measure.desirable : measure.undesirable);
    }
    // The reference point is that of the whole batch, so each micro-batch's loss stands by itself.
    ppo::UnpairedResult result = ppo::unpaired_loss(
        options_,
        {log_probs.rows(), log_probs.values, reference, desirable, mismatched, batch.mismatched_reference});
    const double part = share * static_cast<double>(log_probs.items.size());
    measure.loss += part * result.loss;
    measure.kl = result.kl;
    for (double& derivative : result.d_log_probs) derivative *= part;
    return std::move(result.d_log_probs);
  };
  add_gradient(pass_, policy, examples_of(batch.examples), setting_, LossScope::kMicroBatch, loss);
  measure.add_ranks(*setting_.collective);
  return measure;
}

}  // namespace rlhf

// A batch that is worked on in parts gives what the whole batch gives.
#include <cmath>

#include "rlhf/core/random.h"
#include "rlhf/ppo/experience.h"
#include "rlhf/ppo/policy_loss.h"
#include "rlhf/ppo/value_loss.h"
#include "rlhf/train/micro_batch_pool.h"
#include "tests/catch.h"

using namespace rlhf;
using namespace rlhf::ppo;

namespace {

struct Batch {
  std::vector<std::size_t> offsets{0};
  std::vector<std::uint8_t> mask;
  std::vector<double> log_probs, old_log_probs, advantages, reference, entropies;

  Batch(std::uint64_t seed, std::size_t rows) {
    RandomStream random(seed, 5);
    for (std::size_t row = 0; row < rows; ++row) {
      const std::size_t n = 1 + random.below(6);
      for (std::size_t t = 0; t < n; ++t) {
        mask.push_back(random.below(5) != 0);
        log_probs.push_back(-2 + 0.3 * random.normal());
        old_log_probs.push_back(log_probs.back() + 0.2 * random.normal());
        reference.push_back(log_probs.back() + 0.2 * random.normal());
        advantages.push_back(random.normal());
        entropies.push_back(1 + 0.1 * random.normal());
      }
      offsets.push_back(offsets.back() + n);
    }
  }
  PolicyLossInputs inputs() const {
    PolicyLossInputs in;
    in.rows = {offsets, mask};
    in.log_probs = log_probs;
    in.old_log_probs = old_log_probs;
    in.advantages = advantages;
    in.reference_log_probs = reference;
    in.entropies = entropies;
    return in;
  }
};

}  // namespace

TEST_CASE("sums over parts with totals of 1, divided at the end, are the loss and gradient of the whole") {
  for (const Aggregation mode :
       {Aggregation::kTokenMean, Aggregation::kTokenSum, Aggregation::kSequenceMeanTokenSum,
        Aggregation::kSequenceMeanTokenMean, Aggregation::kSequenceMeanTokenSumNorm, Aggregation::kConstant})
    for (const PolicyObjective objective :
         {PolicyObjective::kClip, PolicyObjective::kCispo, PolicyObjective::kGeometricMean}) {
      PolicyLossOptions options;
      options.objective = objective;
      options.aggregation.mode = mode;
      options.aggregation.scale = 7;
      if (objective != PolicyObjective::kGeometricMean) {
        options.kl.coefficient = 0.3;
        options.entropy_coefficient = 0.1;
      }
      REQUIRE_FALSE(needs_totals(options));
      const Batch batch(3, 9);
      const PolicyLossResult whole = policy_loss(options, batch.inputs());

      double loss = 0;
      std::vector<double> gradient;
      for (std::size_t begin = 0; begin < 9; begin += 4) {
        const std::size_t end = std::min<std::size_t>(9, begin + 4);
        std::vector<std::size_t> offsets;
        for (std::size_t row = begin; row <= end; ++row)
          offsets.push_back(batch.offsets[row] - batch.offsets[begin]);
        PolicyLossInputs part = batch.inputs();
        const std::size_t first = batch.offsets[begin], n = offsets.back();
        part.rows = {offsets, std::span(batch.mask).subspan(first, n)};
        for (auto* field : {&part.log_probs, &part.old_log_probs, &part.advantages, &part.reference_log_probs,
                            &part.entropies})
          *field = field->subspan(first, n);
        part.context.total_tokens = part.context.total_sequences = 1;
        const PolicyLossResult result = policy_loss(options, part);
        loss += result.loss;
        gradient.insert(gradient.end(), result.d_log_probs.begin(), result.d_log_probs.end());
      }
      const double divisor = scope_divisor(options, scope_totals(options, {batch.offsets, batch.mask}));
      INFO("mode " << static_cast<int>(mode) << " objective " << static_cast<int>(objective));
      CHECK(std::abs(loss / divisor - whole.loss) < 1e-12);
      REQUIRE(gradient.size() == whole.d_log_probs.size());
      for (std::size_t t = 0; t < gradient.size(); ++t)
        CHECK(std::abs(gradient[t] / divisor - whole.d_log_probs[t]) < 1e-13);
    }
}

TEST_CASE("losses whose terms have different divisors say that they need the totals") {
  PolicyLossOptions options;
  options.aggregation.mode = Aggregation::kSequenceMeanTokenMean;
  options.entropy_coefficient = 0.1;
  CHECK_FALSE(needs_totals(options));
  options.entropy_aggregation = EntropyAggregation::kTokenMean;
  CHECK(needs_totals(options));
  options.entropy_coefficient = 0;
  options.aggregation.mode = Aggregation::kConstant;
  CHECK(needs_totals(options));  // the widest row
  options.aggregation.scale = 8;
  CHECK_FALSE(needs_totals(options));
}

TEST_CASE("a response with advantages of 0 has no gradient wherever it is left out") {
  for (int number = 0; number <= static_cast<int>(PolicyObjective::kDppoKl); ++number) {
    PolicyLossOptions options;
    options.objective = static_cast<PolicyObjective>(number);
    if (!vanishes_with_advantage(options)) continue;
    Batch batch(11, 6);
    for (std::size_t t = batch.offsets[2]; t < batch.offsets[4]; ++t) batch.advantages[t] = 0;
    const PolicyLossResult loss = policy_loss(options, batch.inputs());
    INFO("objective " << number);
    for (std::size_t t = batch.offsets[2]; t < batch.offsets[4]; ++t) CHECK(loss.d_log_probs[t] == 0);
  }
  PolicyLossOptions with_kl;
  with_kl.kl.coefficient = 0.1;
  CHECK_FALSE(vanishes_with_advantage(with_kl));
}

TEST_CASE("groups on their own give the advantages of the whole batch, bit for bit") {
  PpoOptions options;
  options.samples_per_prompt = 3;
  options.critic_update = CriticUpdate::kNone;
  options.advantage.whitening = Whitening::kNone;
  options.reward.placement = ScorePlacement::kLastToken;
  options.kl.placement = KlRewardPlacement::kSequence;
  options.correction.level = CorrectionLevel::kToken;
  for (const AdvantageForm form : {AdvantageForm::kSequence, AdvantageForm::kRewardToGo})
    for (const GroupBaseline baseline : {GroupBaseline::kMean, GroupBaseline::kLeaveOneOut}) {
      options.advantage.form = form;
      options.advantage.group = {baseline, GroupScale::kGroup};
      REQUIRE_FALSE(needs_whole_batch(options));
      RandomStream random(17, 2);
      std::vector<ScoredResponse> responses;
      for (std::size_t i = 0; i < 12; ++i) {
        ScoredResponse response;
        response.group = i / 3;
        response.score = random.normal();
        for (std::size_t t = 0; t < 1 + random.below(5); ++t) {
          response.log_probs.push_back(-1 + 0.2 * random.normal());
          response.reference_log_probs.push_back(-1 + 0.2 * random.normal());
          response.rollout_log_probs.push_back(response.log_probs.back() + 0.1 * random.normal());
          response.mask.push_back(1);
        }
        if (response.log_probs.empty()) continue;
        responses.push_back(response);
      }
      const Experience whole = compute_experience(options, 0.1, responses);
      std::size_t row = 0;
      for (std::size_t begin = 0; begin < responses.size(); begin += 3) {
        const Experience part = compute_experience(options, 0.1, std::span(responses).subspan(begin, 3));
        for (std::size_t k = 0; k < 3; ++k, ++row)
          for (std::size_t t = 0; t < part.offsets[k + 1] - part.offsets[k]; ++t) {
            CHECK(part.advantages[part.offsets[k] + t] == whole.advantages[whole.offsets[row] + t]);
            CHECK(part.importance_weights[part.offsets[k] + t] ==
                  whole.importance_weights[whole.offsets[row] + t]);
            CHECK(part.old_log_probs[part.offsets[k] + t] == whole.old_log_probs[whole.offsets[row] + t]);
          }
      }
    }
}

TEST_CASE("the micro-batch pool cuts every sequence once, in full passes, and keeps less as the end comes") {
  RandomStream random(5, 9);
  for (int round = 0; round < 50; ++round) {
    const std::size_t n = 1 + random.below(40);
    std::vector<std::vector<TokenId>> sequences(n);
    for (std::size_t i = 0; i < n; ++i) {
      const auto head = static_cast<TokenId>(random.below(3));
      sequences[i].assign(10, head);
      for (std::size_t t = 0; t < 1 + random.below(12); ++t)
        sequences[i].push_back(static_cast<TokenId>(random.below(50)));
    }
    MicroBatchPool pool(64, n);
    std::vector<std::size_t> seen;
    std::size_t arrived = 0;
    while (arrived < n) {
      MicroBatchPool::Indices part;
      std::vector<std::span<const TokenId>> views;
      for (std::size_t k = 0; k < 3 && arrived < n; ++k, ++arrived)
        if (arrived % 7 != 3) {
          part.push_back(arrived);
          views.push_back(sequences[arrived]);
        }
      const std::size_t skipped = std::min<std::size_t>(3, arrived - (arrived - 1) / 3 * 3) - part.size();
      for (const auto& pass : pool.add(part, views, skipped)) {
        CHECK_FALSE(pass.empty());
        seen.insert(seen.end(), pass.begin(), pass.end());
      }
      std::size_t kept = 0;
      for (std::size_t i = 0; i < arrived; ++i) kept += i % 7 != 3;
      kept -= seen.size();
      // 4 passes of at most 64 rows hold at most 6 x 4 sequences of these.
      CHECK(kept <= 32);
    }
    std::size_t expected = 0;
    for (std::size_t i = 0; i < n; ++i) expected += i % 7 != 3;
    std::ranges::sort(seen);
    CHECK(seen.size() == expected);
    CHECK(std::ranges::adjacent_find(seen) == seen.end());
  }
}

TEST_CASE("MaxRL: advantages over the group's mean, by hand") {
  ppo::GroupOptions options;
  options.baseline = ppo::GroupBaseline::kMean;
  options.scale = ppo::GroupScale::kGroupMean;
  options.epsilon = 0;
  // Pass rates 1/4, 3/4, 0; and penalties, which are not part of the pass rate.
  const std::vector<double> scores = {1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 1, -1, -1, -1};
  const std::vector<std::uint64_t> groups = {1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4};
  const auto advantages = ppo::group_advantages(options, {scores, groups, {}});
  const std::vector<double> expected = {3, -1, -1, -1, 1. / 3, 1. / 3, 1. / 3, -1, 0, 0, 0, 0, 6, -2, -2, -2};
  REQUIRE(advantages.size() == expected.size());
  for (std::size_t i = 0; i < expected.size(); ++i) CHECK(std::abs(advantages[i] - expected[i]) < 1e-12);
  // Partial credit of 0.1 in a group without success: 5 without epsilon, (0.1 - 1/60) / (1/60 + 0.15) = 0.5
  // with it.
  options.epsilon = 0.15;
  const std::vector<double> partial = {0.1, 0, 0, 0, 0, 0};
  const auto damped = ppo::group_advantages(options, {partial, std::vector<std::uint64_t>(6, 1), {}});
  CHECK(std::abs(damped[0] - 0.5) < 1e-12);
}

TEST_CASE("a score lies on the last counting token, or behind it where the row goes on") {
  // Padding behind, none, a hole, nothing that counts, no positions.
  const std::vector<std::size_t> offsets = {0, 4, 7, 11, 13, 13};
  const std::vector<std::uint8_t> mask = {1, 1, 0, 0, 1, 1, 1, 1, 0, 1, 0, 0, 0};
  const TokenRows rows{offsets, mask};
  const auto position = [&](std::size_t row, ScorePlacement placement) -> int {
    const auto at = score_position(rows, row, placement);
    return at ? static_cast<int>(*at) : -1;
  };
  const int last[] = {1, 6, 9, -1, -1}, behind[] = {2, 6, 10, 11, -1};
  for (std::size_t row = 0; row < 5; ++row) {
    INFO("row " << row);
    CHECK(position(row, ScorePlacement::kLastToken) == last[row]);
    CHECK(position(row, ScorePlacement::kAfterLast) == behind[row]);
  }
}

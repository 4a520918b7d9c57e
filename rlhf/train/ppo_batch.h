#pragma once

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "rlhf/data/sample.h"
#include "rlhf/ppo/experience.h"
#include "rlhf/ppo/score_normalizer.h"
#include "rlhf/train/generation.h"
#include "rlhf/train/ppo_options.h"
#include "rlhf/train/sampled_response.h"
#include "rlhf/train/schedule_options.h"
#include "rlhf/train/stage.h"
#include "rlhf/train/term_normalizers.h"

namespace rlhf {

/// What surrounds the iterations of a PPO stage.
struct PpoSetting {
  const TaskData& data;
  const RolloutOptions& rollout;
  const PpoStageOptions& options;
  const StageContext& context;
  ScheduleOptions schedule = {};
  /// Changes the request of one response before it is submitted, e.g. to give it a recorded length. Slots
  /// count responses over the run: iteration * batch + place in the batch, groups together. Empty = nothing
  /// is changed.
  std::function<void(GenerationRequest& request, std::uint64_t slot)> adjust_request = {};
};

/// Whether no advantage is known before the last response is scored.
bool needs_whole_batch(const PpoSetting& setting);

/// What a PPO stage learns of its own numbers from batch to batch.
struct PpoState {
  explicit PpoState(const PpoSetting& setting);

  ppo::KlController kl;
  ppo::ScoreNormalizer scores;
  TermNormalizers terms;

  /// By name, for checkpoints.
  void save(std::map<std::string, double>& numbers) const;
  void restore(const std::map<std::string, double>& numbers);
};

/// One response of a rollout batch and all that is known about it. Written by the generate lane until its
/// group is complete, by the train lane after that.
///
/// Its `tokens` are what a forward pass runs: without the last one where nothing reads what follows it (no
/// critic, no reward model).
struct PpoResponse : SampledResponse {
  ppo::ScoredResponse scored;
  std::vector<float> trunk;  ///< [tokens, D] of the frozen layers; empty when it is not kept

  /// Position whose hidden state predicts response token t.
  std::int64_t predictor(std::size_t t) const {
    return static_cast<std::int64_t>(prompt->tokens.size() + t) - 1;
  }
};

/// The samples of an iteration, filled by the generate lane.
struct PpoSamples {
  std::vector<PpoResponse>& responses;   ///< group by group
  std::vector<SampledResponse>& greedy;  ///< ReMax: one of each group; else empty
  const std::vector<int>& ranks;         ///< of each response: the rank that samples and scores it
};

}  // namespace rlhf

#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "rlhf/model/sequence_pass.h"
#include "rlhf/train/generation.h"
#include "rlhf/train/sampled_response.h"
#include "rlhf/train/stage.h"

namespace rlhf {

/// How many responses a stage samples, and who judges them.
struct GroupSamplerOptions {
  std::int64_t samples_per_prompt = 4;
  double reward_model_weight = 0;   ///< weight of the reward model's score beside the rules
  std::int64_t samples_to_log = 4;  ///< responses written to samples/ per iteration

  template <class V>
  void visit_fields(V& v) {
    v.field("samples_per_prompt", samples_per_prompt, "Responses to each prompt", {2, 1e5});
    v.field("reward_model_weight", reward_model_weight, "Weight of the reward model's score beside the rules",
            {-1e6, 1e6});
    v.field("samples_to_log", samples_to_log, "Responses written to samples/ per iteration", {0, 1e6});
  }
};

/// A judged response to one of the training prompts.
struct GroupResponse : SampledResponse {
  double score = 0;  ///< of all judges
};
/// The responses to one prompt, in the order in which they were drawn.
using ResponseGroup = std::vector<GroupResponse>;

/// Samples several responses to each of some training prompts and has them judged, by the rollout engine and
/// the judges of PPO. One per stage; the engine's memory is kept between calls.
class GroupSampler {
 public:
  /// @param stage for messages and the name of the samples' file
  /// @throws InvalidArgument when there are no prompts or no judges
  GroupSampler(std::string stage, const LanguageModel& policy, const Parameters<float>* reward_model,
               const TaskData& data, const RolloutOptions& rollout, const GroupSamplerOptions& options,
               const StageContext& context);

  /// Answers `num_prompts` training prompts of an iteration (from 0) with the policy as it is now; 0 = all
  /// prompts. Draws are a function of the run's seed and the iteration.
  std::vector<ResponseGroup> sample(std::int64_t iteration, std::int64_t num_prompts);
  /// Statistics of a call's responses and its time, by the names in docs/reference/metrics.md.
  Metrics metrics(const std::vector<ResponseGroup>& groups) const;

 private:
  std::vector<ResponseGroup> draw(std::int64_t iteration, std::int64_t num_prompts);
  void judge_by_rules(ResponseGroup& group, std::int64_t iteration) const;
  void judge(std::vector<ResponseGroup>& groups, std::int64_t iteration);
  void judge_by_model(const std::vector<GroupResponse*>& all,
                      const std::vector<TrainingExample>& answers) const;
  void log(const std::vector<ResponseGroup>& groups, std::int64_t iteration) const;

  std::string stage_;
  const LanguageModel& policy_;
  const TaskData& data_;
  const RolloutOptions& rollout_;
  GroupSamplerOptions options_;
  const StageContext& context_;
  Judges judges_;
  std::optional<RolloutWeights> packed_;  ///< what is sampled with, unless it is fp32
  std::unique_ptr<RolloutEngine> engine_;
  double seconds_ = 0;  ///< of the last call
};

/// The response with the highest score, the first of equal ones.
const GroupResponse& best_of(const ResponseGroup& group);
/// The response with the lowest score, the first of equal ones.
const GroupResponse& worst_of(const ResponseGroup& group);
/// A response as something to learn from: loss on the tokens that the policy has chosen.
TrainingExample to_example(const SampledResponse& response);

}  // namespace rlhf

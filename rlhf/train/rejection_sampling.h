#pragma once

#include <optional>

#include "rlhf/train/group_sampler.h"
#include "rlhf/train/sft.h"

namespace rlhf {

/// Which of a prompt's responses are learned.
enum class KeptResponses { kBest, kAll };

/// Rejection-sampling fine-tuning: supervised fine-tuning on the policy's own best responses.
struct RejectionSamplingOptions {
  std::int64_t iterations = 1;
  std::int64_t prompts_per_iteration = 0;  ///< 0 = all
  GroupSamplerOptions sampler;
  KeptResponses keep = KeptResponses::kBest;
  std::optional<double> min_score;  ///< responses below it are not learned
  SftOptions sft;                   ///< of each iteration

  template <class V>
  void visit_fields(V& v) {
    v.field("iterations", iterations, "Rounds of sampling and training", {1, 1e6});
    v.field("prompts_per_iteration", prompts_per_iteration, "Prompts sampled in each iteration; 0 = all",
            {0, 1e9});
    sampler.visit_fields(v);
    v.choice("keep", keep, {{"best", KeptResponses::kBest}, {"all", KeptResponses::kAll}},
             "Responses to learn: the best one of each prompt, or all with at least min_score");
    v.field("min_score", min_score, "Responses with a lower score are not learned");
    v.group("sft", sft, "Training of each iteration");
  }
  void validate(config::Problems& problems) const {
    if (keep == KeptResponses::kAll && !min_score)
      problems.add("min_score", "keep: all needs it, or every response is learned");
  }
};

/// The stage `rejection_sampling` (best of n; RAFT, Dong et al. 2023; Llama 2, Touvron et al. 2023): each
/// iteration samples from the policy, keeps what the judges liked and runs SFT on it, reported as stage
/// `rejection_sampling.<iteration>`.
class RejectionSampling {
 public:
  /// @param reward_model may be null when reward_model_weight is 0
  /// @throws InvalidArgument when there are no prompts or no judges
  RejectionSampling(LanguageModel& policy, const Parameters<float>* reward_model, const TaskData& data,
                    const RolloutOptions& rollout, const RejectionSamplingOptions& options,
                    const StageContext& context);

  /// Trains the policy. A resumed run samples the responses of an unfinished iteration again.
  /// @throws StageStopped, Error naming the iteration when no response reaches min_score
  void run();

 private:
  std::vector<TrainingExample> choose(const std::vector<ResponseGroup>& groups, std::int64_t iteration) const;

  LanguageModel& policy_;
  const RejectionSamplingOptions& options_;
  const StageContext& context_;
  GroupSampler sampler_;
};

}  // namespace rlhf

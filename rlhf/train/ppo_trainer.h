#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "rlhf/model/sequence_pass.h"
#include "rlhf/ppo/experience.h"
#include "rlhf/ppo/options.h"
#include "rlhf/train/checkpoint.h"
#include "rlhf/train/optimizer.h"
#include "rlhf/train/stage.h"
#include "rlhf/train/task_data.h"
#include "rollout/engine/rollout_engine.h"

namespace rlhf {

/// How responses are sampled, in training and in evaluation.
struct RolloutOptions {
  SamplingOptions sampling;
  std::int64_t max_new_tokens = 64;
  std::vector<std::string> stop_strings;
  std::int64_t max_sequences = 32;         ///< samples that decode at once
  std::int64_t max_tokens_per_step = 512;  ///< decode tokens and prefill chunk of one engine step

  template <class V>
  void visit_fields(V& v) {
    v.group("sampling", sampling, "Distribution that tokens are drawn from");
    v.field("max_new_tokens", max_new_tokens, "Longest response in tokens", {1, 1 << 20});
    v.field("stop_strings", stop_strings, "Texts that end a response");
    v.field("max_sequences", max_sequences, "Samples that decode at once", {1, 4096});
    v.field("max_tokens_per_step", max_tokens_per_step, "Decode tokens and prefill chunk of one engine step",
            {1, 1 << 20});
  }
};

enum class OldLogProbs { kAuto, kRollout, kRecompute };
enum class CriticInit { kPolicy, kReward };

/// The PPO stage: the algorithm and what surrounds it.
struct PpoStageOptions {
  std::int64_t iterations = 20;  ///< rollout batches
  std::int64_t max_tokens_per_micro_batch =
      1024;                        ///< prompt and response tokens of one forward/backward pass
  double reward_model_weight = 0;  ///< weight of the reward model's score beside the rules
  OldLogProbs old_log_probs = OldLogProbs::kAuto;
  CriticInit critic_init = CriticInit::kPolicy;
  std::int64_t samples_to_log = 4;  ///< responses written to samples/ per iteration
  ppo::PpoOptions algorithm;

  template <class V>
  void visit_fields(V& v) {
    v.field("iterations", iterations, "Rollout batches", {1, 1e9});
    v.field("max_tokens_per_micro_batch", max_tokens_per_micro_batch, "Prompt and response tokens per pass",
            {2, 1e8});
    v.field("reward_model_weight", reward_model_weight, "Weight of the reward model's score beside the rules",
            {-1e6, 1e6});
    v.choice("old_log_probs", old_log_probs,
             {{"auto", OldLogProbs::kAuto},
              {"rollout", OldLogProbs::kRollout},
              {"recompute", OldLogProbs::kRecompute}},
             "Log-probs the ratio is formed against: the sampler's, or a forward pass of the trainer. auto "
             "takes the "
             "sampler's where no filter changes its distribution, since both are then equal bit for bit");
    v.choice("critic_init", critic_init, {{"policy", CriticInit::kPolicy}, {"reward", CriticInit::kReward}},
             "Weights the critic starts from");
    v.field("samples_to_log", samples_to_log, "Responses written to samples/ per iteration", {0, 1e6});
    v.group("algorithm", algorithm, "PPO and its relatives; preset: NAME loads configs/presets/NAME.yaml");
  }
};

/// Number of leading layers (embedding included) whose weights two models share in memory.
std::int64_t shared_trunk_layers(const DecoderWeights<float>& a, const DecoderWeights<float>& b);

/// One prompt's request with the run's sampling, stop tokens and the task's tool.
GenerationRequest make_request(const Prompt& prompt, const RolloutOptions& rollout,
                               const LanguageModel& model, const TaskData& data);
/// An engine whose cache holds `max_sequences` samples of the longest prompt and response.
std::unique_ptr<RolloutEngine> make_engine(const LanguageModel& model, const RolloutOptions& rollout,
                                           const std::vector<Prompt>& prompts, const Compute<float>& compute);
/// Runs all requests to the end. Samples are ordered by (request, sample index).
std::vector<Sample> generate_all(RolloutEngine& engine, const DecoderWeights<float>& weights,
                                 WeightVersion version, std::vector<GenerationRequest> requests);
/// Decoded response without special tokens.
std::string response_text(const LanguageModel& model, const Sample& sample);

/// Trains a policy with PPO or a relative: `run` reads like Algorithm 1 of Schulman et al. 2017.
class PpoTrainer {
 public:
  /// @param reward_model may be null when reward_model_weight is 0; @param critic_base weights the critic
  /// starts from
  PpoTrainer(LanguageModel& policy, const Parameters<float>& reference, const Parameters<float>* reward_model,
             const Parameters<float>* critic_base, const TaskData& data, const RolloutOptions& rollout,
             const PpoStageOptions& options, const StageContext& context);

  /// Runs all iterations. @throws StageStopped; Error naming iteration and phase when a number is not finite.
  void run();

 private:
  struct Response;
  struct Batch;

  std::vector<std::size_t> prompts_of(std::int64_t iteration, std::int64_t round) const;
  void generate(Batch& batch, std::int64_t iteration);
  void score(Batch& batch);
  void forward_models(Batch& batch);
  void estimate_advantages(Batch& batch);
  void update(Batch& batch, std::int64_t iteration);
  void train_mini_batch(Batch& batch, const std::vector<std::size_t>& responses);
  void train_micro_batch(Batch& batch, const std::vector<std::size_t>& responses,
                         const ppo::AggregationContext& policy, const ppo::AggregationContext& value);
  void log_samples(const Batch& batch, std::int64_t iteration);
  double learning_rate(const OptimizerOptions& options, std::int64_t iteration) const;
  bool recompute_old_log_probs() const;

  LanguageModel& policy_;
  const Parameters<float>& reference_;
  const Parameters<float>* reward_model_;
  const TaskData& data_;
  const RolloutOptions& rollout_;
  const PpoStageOptions& options_;
  const StageContext& context_;
  std::optional<Parameters<float>> critic_;
  Optimizer<float> policy_optimizer_;
  std::optional<Optimizer<float>> critic_optimizer_;
  std::unique_ptr<RolloutEngine> engine_;
  SequencePass<float> pass_;
  std::int64_t trunk_layers_ = 0;  ///< shared by all models of the stage; 0 = none
  ppo::KlController kl_controller_;
  double policy_learning_rate_ = 0, critic_learning_rate_ = 0;
};

}  // namespace rlhf

#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>

#include "rlhf/model/rollout_weights.h"
#include "rlhf/model/sequence_pass.h"
#include "rlhf/train/generation.h"
#include "rlhf/train/length_prediction.h"
#include "rlhf/train/optimizer.h"
#include "rlhf/train/ppo_memory.h"
#include "rlhf/train/ppo_options.h"
#include "rlhf/train/sampled_response.h"
#include "rlhf/train/schedule_options.h"
#include "rlhf/train/stage.h"
#include "rlhf/train/teacher.h"

namespace rlhf {

/// Models that a PPO stage reads but does not train.
struct FrozenModels {
  const Parameters<float>* reference = nullptr;    ///< may be null when no KL is used
  const Parameters<float>* reward = nullptr;       ///< may be null when reward_model_weight is 0
  const Parameters<float>* critic_base = nullptr;  ///< weights the critic starts from; null = the policy's
  const Parameters<float>* teacher = nullptr;      ///< may be null without distillation
};

/// Everything of a PPO stage that outlives an iteration: the models, their optimizers, the generator and the
/// training pass, all over one set of weights.
struct PpoModels {
  /// @throws InvalidArgument when the options need a model or a reward that is not there.
  PpoModels(LanguageModel& policy, const FrozenModels& frozen, const TaskData& data,
            const RolloutOptions& rollout, const PpoStageOptions& options, const StageContext& context,
            const ScheduleOptions& schedule);

  LanguageModel& policy;
  const Parameters<float>* reference;
  const Parameters<float>* reward;
  Judges judges;
  std::optional<Teacher> teacher;  ///< of distillation
  std::optional<Parameters<float>> critic;
  Optimizer<float> policy_optimizer;
  std::optional<Optimizer<float>> critic_optimizer;
  std::optional<Parameters<float>> snapshot;      ///< what generation reads off-policy
  std::optional<RolloutWeights> rollout_weights;  ///< what generation reads, unless it is fp32
  std::unique_ptr<ThreadPool> generate_pool;      ///< of the generate lane; null = it has the train lane's
  std::unique_ptr<DeviceMemory> generate_queue;   ///< likewise, on an accelerator
  std::optional<Accelerator> generate_device;     ///< the accelerator with that queue
  Arena arena;                                    ///< of engine and pass
  std::unique_ptr<RolloutEngine> engine;
  LengthPrediction lengths;    ///< of the generate lane
  double generated_flops = 0;  ///< of the engine, until the last complete batch; the generate lane's
  SequencePass<float> pass;
  std::unique_ptr<PpoMemory> memory;  ///< of engine and pass
  std::uint64_t trunk_cache_bytes = 0;
  std::int64_t trunk_layers = 0;  ///< leading layers that all models have in common; 0 = none
  bool sampled_trunk = false;     ///< the generator hands over what it computed in them

  /// Layers whose activations a training pass keeps.
  std::int64_t trained_layers() const {
    return policy.config().num_layers - policy.parameters().weights().first_trainable_layer;
  }
  const DecoderWeights<float>& generation_weights() const {
    return rollout_weights ? rollout_weights->weights() : generation_source();
  }
  /// Makes generation read the policy as it is now. Between two decode steps only.
  void publish(const Compute<float>& compute);
  /// Packs what generation reads, after weights have come from a checkpoint.
  void pack(const Compute<float>& compute);
  /// Time that packing took since the last call. Train lane, like publish.
  double take_pack_seconds() { return std::exchange(pack_seconds_, 0); }
  /// Bytes written for generation to read other weights, since the last call; none on policy in fp32, where
  /// it reads those that are trained. Train lane.
  std::uint64_t take_copied_bytes() { return std::exchange(copied_bytes_, 0); }

 private:
  const DecoderWeights<float>& generation_source() const {
    return snapshot ? snapshot->weights() : policy.parameters().weights();
  }
  Compute<float> open_generate_lane(const Compute<float>& train);
  PpoMemory::Setting memory_setting(const FrozenModels& frozen, const TaskData& data,
                                    const RolloutOptions& rollout, const PpoStageOptions& options,
                                    const StageContext& context, const ScheduleOptions& schedule) const;

  double pack_seconds_ = 0;
  std::uint64_t copied_bytes_ = 0;
};

/// Number of leading layers (embedding included) whose weights two models share in memory.
std::int64_t shared_trunk_layers(const DecoderWeights<float>& a, const DecoderWeights<float>& b);

}  // namespace rlhf

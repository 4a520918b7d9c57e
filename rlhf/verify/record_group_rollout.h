#pragma once

#include <cstdint>
#include <vector>

#include "rlhf/ppo/experience.h"
#include "rlhf/verify/record_object.h"
#include "rlhf/verify/record_rows.h"
#include "rlhf/verify/trl_options.h"

namespace rlhf::verify {

/// Parameters of a GRPO or RLOO record in terms of the presets trl-grpo and trl-rloo.
struct GroupRecordOptions {
  bool rloo = false;
  ppo::PpoOptions algorithm;
  TrlLossType loss_type;
  OptimizerOptions optimizer;
  double temperature = 1;
  double beta = 0;  ///< weight of the KL: in the loss (grpo), in the reward (rloo)
  TokenId pad = 0, end = 0;
  std::size_t batch = 0;                 ///< responses of a rollout
  std::size_t micro_batch = 0;           ///< responses of a micro-batch
  std::size_t accumulation = 1;          ///< micro-batches of an optimizer step
  std::size_t steps_per_generation = 1;  ///< micro-batches of a rollout
  std::size_t iterations = 1;            ///< passes over a rollout
  std::size_t max_steps = 0, max_completion_length = 0;
};
/// @throws InvalidArgument for a value that TRL does not define or this library cannot express.
GroupRecordOptions read_group_record_options(GoldenCase& golden);

/// One rollout of a record, without padding. Responses that mask_truncated_completions leaves out have no
/// tokens here: they neither train nor have log-probs in the record.
struct GroupRollout {
  PaddedRows tokens;
  std::vector<RecordResponse> responses;
  std::vector<std::vector<TokenId>> completions;  ///< as recorded, with padding
  std::vector<std::uint8_t> ended, dropped;       ///< per response
  bool padded_prompts = false, has_old_log_probs = false;
  std::vector<double> log_probs, reference_log_probs;  ///< per token, of policy and reference
  std::vector<double> response_advantages;             ///< per response
  std::vector<double> advantages;                      ///< per token
  std::vector<std::uint8_t> unused;  ///< per response: not yet in this pass over the rollout
};
/// Reads the tokens of a rollout event and checks the masks.
GroupRollout read_group_rollout(RecordObject& event, const GroupRecordOptions& options);
/// Checks log-probs, rewards and advantages, which it computes.
void check_group_rollout(GoldenCase& golden, RecordObject& event, const GroupRecordOptions& options,
                         Tolerance tolerance, GroupRollout& rollout);

/// The rows of one loss event.
struct GroupMicroBatch {
  std::vector<std::size_t> rows;
  PaddedRows tokens;
  std::vector<RecordResponse> responses;
  std::vector<double> old_log_probs, reference_log_probs, advantages;  ///< per token
  std::vector<double> log_probs;                                       ///< per token, of the loss
  std::vector<double> response_advantages;
};
/// Finds the rows by completion and advantage (TRL shuffles rollouts), and marks them used.
GroupMicroBatch read_group_micro_batch(RecordObject& event, const GroupRecordOptions& options,
                                       Tolerance tolerance, GroupRollout& rollout);
/// Checks what a loss event lists per token or response.
void check_group_terms(GoldenCase& golden, RecordObject& event, const GroupRecordOptions& options,
                       Tolerance tolerance, const GroupMicroBatch& micro, const ppo::PolicyLossResult& loss);
/// What responses without tokens add to TRL's RLOO loss: -advantage times a ratio of 1, without gradient.
double untrained_loss(const GroupRecordOptions& options, const GroupMicroBatch& micro);

}  // namespace rlhf::verify

#pragma once

#include <optional>
#include <set>
#include <vector>

#include "rlhf/ppo/experience.h"
#include "rlhf/verify/record_object.h"
#include "rlhf/verify/record_rows.h"

namespace rlhf::verify {

/// Parameters of a PPO record: TRL's configuration in terms of the preset trl-ppo.
struct PpoRecordOptions {
  ppo::PpoOptions algorithm;
  double temperature = 1;       ///< what logits are divided by
  std::optional<TokenId> stop;  ///< responses are cut after it
  TokenId pad = 0, end = 0;
  std::size_t batch = 0;         ///< rows of a rollout
  std::size_t mini_batch = 0;    ///< rows of a mini-batch
  std::size_t micro_batch = 0;   ///< rows of a micro-batch; the last of a mini-batch may have fewer
  std::size_t accumulation = 1;  ///< divisor of every micro-batch's loss
  std::size_t mini_batches = 1, epochs = 1, updates = 1, response_length = 0;
};
/// @throws InvalidArgument for a value that TRL does not define or this library cannot express.
PpoRecordOptions read_ppo_record_options(GoldenCase& golden);

/// One rollout of a record. TRL computes on a padded matrix; here rows are ragged, in three lengths.
struct PpoRollout {
  PaddedRows tokens;  ///< kept tokens: before the first padding token of the truncated response
  PaddedRows slots;   ///< tokens plus the slot after them where the matrix has one
  /// Positions whose prefix holds no padding token: there the untruncated matrix means something to a ragged
  /// model. Behind a padding token it does not (its own hidden state attends to everything but itself).
  PaddedRows visible;
  std::vector<RecordResponse> responses;               ///< prompt, and the visible tokens
  std::vector<std::uint8_t> ended;                     ///< holds the end token, wherever it stands
  double num_end_tokens = 0;                           ///< in the untruncated responses
  std::vector<double> log_probs, reference_log_probs;  ///< per visible position
  std::vector<double> values;                          ///< per slot
  std::vector<double> scores;                          ///< per row, of the reward model
  ppo::Experience experience;
};

/// Reads the tokens of an update, and checks everything that follows from them alone.
/// @param prompts of the data set, without padding
PpoRollout read_ppo_rollout(RecordObject& update, const PpoRecordOptions& options,
                            const std::set<std::vector<TokenId>>& prompts);

/// Runs the advantage stage on what the models said and checks every step of it.
void check_ppo_experience(RecordObject& update, const PpoRecordOptions& options, Tolerance tolerance,
                          PpoRollout& rollout);

}  // namespace rlhf::verify

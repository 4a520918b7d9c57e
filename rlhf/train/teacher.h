#pragma once

#include <filesystem>
#include <span>
#include <vector>

#include "rlhf/model/sequence_pass.h"
#include "rlhf/train/language_model.h"

namespace rlhf {

/// Loads the teacher of a distillation, frozen. @throws InvalidArgument unless its tokens are the policy's:
/// size of the vocabulary, and the bytes of every token where both have a tokenizer; IoError
LanguageModel load_teacher(const std::filesystem::path& path, const LanguageModel& policy);
/// The check of load_teacher. `name` is the teacher's, for messages.
void require_same_tokens(const std::string& name, const LanguageModel& teacher, const LanguageModel& policy);

/// A teacher that grades the policy's samples: another model over the same tokens, with a pass of its own.
class Teacher {
 public:
  Teacher(const Parameters<float>& parameters, const Compute<float>& compute)
      : parameters_(parameters), pass_(parameters.config(), compute) {}

  /// As DecoderRunner::matmul_flops.
  double matmul_flops() const { return pass_.matmul_flops(); }
  /// Log-probs of the targets under the teacher.
  std::vector<double> log_probs(const PackedRows& rows, std::span<const TokenTarget> targets,
                                double temperature);
  /// Adds the gradient of sum_i weights[i] * KL(pi || teacher), exact over the vocabulary, at the rows of the
  /// targets to the policy's head and hidden states. Targets of weight 0 are left out. The policy's pass has
  /// just run `rows` forward, to be kept for backward.
  /// @return that sum, nats
  double add_reverse_kl(SequencePass<float>& policy_pass, const DecoderWeights<float>& policy,
                        const PackedRows& rows, std::span<const TokenTarget> targets,
                        std::span<const double> weights, double temperature);

 private:
  const Parameters<float>& parameters_;
  SequencePass<float> pass_;
};

}  // namespace rlhf

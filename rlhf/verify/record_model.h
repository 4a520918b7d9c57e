#pragma once

#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "rlhf/model/parameters.h"
#include "rlhf/model/sequence_pass.h"
#include "rlhf/train/optimizer.h"
#include "rlhf/verify/record_rows.h"

namespace rlhf::verify {

/// A model of a trainer record in the record's own precision: weights from a checkpoint folder, and the
/// library's forward, backward and optimizer.
template <class T>
class RecordModel {
 public:
  RecordModel(const std::filesystem::path& checkpoint, const OptimizerOptions& optimizer,
              const Compute<T>& compute);

  const ModelConfig& config() const { return parameters_.config(); }
  enum class Use { kScore, kTrain };
  /// Runs the sequences; with kTrain backward may follow.
  void forward(const SequenceBatch& batch, Use use);
  struct TokenOutputs {
    std::vector<double> log_probs, entropies;
  };
  /// Log-probs and entropies of all targets, of the last forward.
  TokenOutputs token_outputs(const SequenceBatch& batch, double temperature);
  /// Outputs of the scalar head at the given rows, of the last forward.
  std::vector<double> scalar_outputs(std::span<const std::int64_t> rows);
  /// Adds the gradient of all weights for the gradient of the last token_outputs; `d_entropies` may be empty.
  void backward_tokens(const SequenceBatch& batch, double temperature, std::span<const double> d_log_probs,
                       std::span<const double> d_entropies);
  void backward_scalars(const SequenceBatch& batch, std::span<const std::int64_t> rows,
                        std::span<const double> d_values);
  /// Steps and returns the gradient norm before clipping.
  double step(double learning_rate);

  /// L2 norm of each weight, or of its gradient, as prefix + Hugging Face name.
  std::map<std::string, double> weight_norms(const std::string& prefix) const;
  std::map<std::string, double> gradient_norms(const std::string& prefix) const;
  /// Compares all weights with those of a checkpoint folder.
  void compare_weights(GoldenCase& golden, const std::filesystem::path& checkpoint,
                       Tolerance tolerance) const;

 private:
  Compute<T> compute_;
  Parameters<T> parameters_;
  SequencePass<T> pass_;
  Optimizer<T> optimizer_;
};

extern template class RecordModel<float>;
extern template class RecordModel<double>;

}  // namespace rlhf::verify

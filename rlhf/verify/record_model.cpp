#include "rlhf/verify/record_model.h"

#include <cmath>

#include "rlhf/core/error.h"
#include "rlhf/model/weight_file.h"

namespace rlhf::verify {
namespace {

template <class T>
Parameters<T> load_parameters(const std::filesystem::path& checkpoint) {
  Parameters<T> parameters(load_model_config(checkpoint), {}, nullptr);
  parameters.load(*WeightFile::open(checkpoint));
  return parameters;
}

template <class T>
std::vector<T> convert(std::span<const double> values) {
  return {values.begin(), values.end()};
}

template <class T>
double norm_of(const T* values, std::int64_t count) {
  double sum = 0;
  for (std::int64_t i = 0; i < count; ++i)
    sum += static_cast<double>(values[i]) * static_cast<double>(values[i]);
  return std::sqrt(sum);
}

}  // namespace

template <class T>
RecordModel<T>::RecordModel(const std::filesystem::path& checkpoint, const OptimizerOptions& optimizer,
                            const Compute<T>& compute)
    : compute_(compute),
      parameters_(load_parameters<T>(checkpoint)),
      pass_(parameters_.config(), compute),
      optimizer_(optimizer, parameters_.trainable().size()) {}

template <class T>
void RecordModel<T>::forward(const SequenceBatch& batch, Use use) {
  using Keep = typename SequencePass<T>::Keep;
  pass_.forward(parameters_.weights(), batch.packed(),
                use == Use::kTrain ? Keep::kForBackward : Keep::kNothing);
}

template <class T>
typename RecordModel<T>::TokenOutputs RecordModel<T>::token_outputs(const SequenceBatch& batch,
                                                                    double temperature) {
  std::vector<T> log_probs(batch.targets().size()), entropies(batch.targets().size());
  pass_.token_logprobs(parameters_.weights(), batch.targets(), temperature, log_probs, entropies);
  return {{log_probs.begin(), log_probs.end()}, {entropies.begin(), entropies.end()}};
}

template <class T>
std::vector<double> RecordModel<T>::scalar_outputs(std::span<const std::int64_t> rows) {
  std::vector<T> values(rows.size());
  pass_.scalar_outputs(parameters_.weights(), rows, values);
  return {values.begin(), values.end()};
}

template <class T>
void RecordModel<T>::backward_tokens(const SequenceBatch& batch, double temperature,
                                     std::span<const double> d_log_probs,
                                     std::span<const double> d_entropies) {
  pass_.token_logprobs_backward(parameters_.weights(), batch.targets(), temperature, convert<T>(d_log_probs),
                                convert<T>(d_entropies));
  pass_.backward(parameters_.weights(), batch.packed());
}

template <class T>
void RecordModel<T>::backward_scalars(const SequenceBatch& batch, std::span<const std::int64_t> rows,
                                      std::span<const double> d_values) {
  pass_.scalar_outputs_backward(parameters_.weights(), rows, convert<T>(d_values));
  pass_.backward(parameters_.weights(), batch.packed());
}

template <class T>
double RecordModel<T>::step(double learning_rate) {
  return optimizer_.step(compute_, parameters_, learning_rate).gradient_norm;
}

template <class T>
std::map<std::string, double> RecordModel<T>::weight_norms(const std::string& prefix) const {
  std::map<std::string, double> norms;
  for (const auto& entry : parameters_.entries())
    norms[prefix + entry.spec.name] = norm_of(entry.value, entry.spec.num_elements());
  return norms;
}

template <class T>
std::map<std::string, double> RecordModel<T>::gradient_norms(const std::string& prefix) const {
  std::map<std::string, double> norms;
  for (const auto& entry : parameters_.entries())
    norms[prefix + entry.spec.name] = norm_of(entry.gradient, entry.spec.num_elements());
  return norms;
}

template <class T>
void RecordModel<T>::compare_weights(GoldenCase& golden, const std::filesystem::path& checkpoint,
                                     Tolerance tolerance) const {
  const Parameters<T> after = load_parameters<T>(checkpoint);
  for (const auto& entry : parameters_.entries()) {
    const auto* expected = after.find(entry.spec.name);
    RLHF_CHECK(expected && expected->spec.shape == entry.spec.shape, checkpoint.string(), ": ",
               entry.spec.name, " has another shape");
    const std::int64_t count = entry.spec.num_elements();
    golden.compare(concat(checkpoint.filename().string(), ".", entry.spec.name),
                   std::vector<double>(entry.value, entry.value + count),
                   std::vector<double>(expected->value, expected->value + count), tolerance);
  }
}

template class RecordModel<float>;
template class RecordModel<double>;

}  // namespace rlhf::verify

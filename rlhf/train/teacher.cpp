#include "rlhf/train/teacher.h"

#include <algorithm>

#include "rlhf/core/error.h"
#include "rlhf/ppo/distillation.h"
#include "rlhf/train/token_distributions.h"

namespace rlhf {
namespace {

using Keep = SequencePass<float>::Keep;

}  // namespace

LanguageModel load_teacher(const std::filesystem::path& path, const LanguageModel& policy) {
  TrainableOptions frozen;
  frozen.mode = TrainableMode::kNone;
  LanguageModel teacher = LanguageModel::load(path, frozen);
  require_same_tokens(path.string(), teacher, policy);
  return teacher;
}

void require_same_tokens(const std::string& name, const LanguageModel& teacher, const LanguageModel& policy) {
  const std::string where = concat("distillation.teacher: ", name, ": ");
  RLHF_CHECK(!teacher.config().scalar_head, where, "is a reward or value model, expected a language model");
  RLHF_CHECK(teacher.config().vocab_size == policy.config().vocab_size, where, "has a vocabulary of ",
             teacher.config().vocab_size, ", the policy's has ", policy.config().vocab_size,
             "; both need the same tokenizer");
  if (!teacher.has_tokenizer() || !policy.has_tokenizer()) return;
  const Tokenizer &theirs = teacher.tokenizer(), &ours = policy.tokenizer();
  RLHF_CHECK(theirs.vocab_size() == ours.vocab_size(), where, "its tokenizer has ", theirs.vocab_size(),
             " tokens, the policy's has ", ours.vocab_size());
  for (TokenId id = 0; id < ours.vocab_size(); ++id)
    RLHF_CHECK(theirs.token_bytes(id) == ours.token_bytes(id), where, "token ", id, " is '",
               theirs.token_bytes(id), "', the policy's is '", ours.token_bytes(id),
               "'; both need the same tokenizer");
}

std::vector<double> Teacher::log_probs(const PackedRows& rows, std::span<const TokenTarget> targets,
                                       double temperature) {
  std::vector<float> flat(targets.size());
  pass_.forward(parameters_.weights(), rows, Keep::kNothing);
  pass_.token_logprobs(parameters_.weights(), targets, temperature, flat, {});
  return {flat.begin(), flat.end()};
}

double Teacher::add_reverse_kl(SequencePass<float>& policy_pass, const DecoderWeights<float>& policy,
                               const PackedRows& rows, std::span<const TokenTarget> targets,
                               std::span<const double> weights, double temperature) {
  const auto vocabulary = static_cast<std::size_t>(parameters_.config().vocab_size);
  std::vector<std::size_t> counting;
  for (std::size_t t = 0; t < targets.size(); ++t)
    if (weights[t] != 0) counting.push_back(t);
  pass_.forward(parameters_.weights(), rows, Keep::kNothing);
  std::vector<float> log_q(std::min(kDistributionRows, counting.size()) * vocabulary);
  std::vector<double> kl(counting.size());
  for (std::size_t begin = 0; begin < counting.size(); begin += kDistributionRows) {
    const std::size_t count = std::min(kDistributionRows, counting.size() - begin);
    std::vector<std::int64_t> chunk;
    for (std::size_t i = 0; i < count; ++i) chunk.push_back(targets[counting[begin + i]].row);
    pass_.log_distributions(parameters_.weights(), chunk, {log_q.data(), count * vocabulary});
    policy_pass.distributions_backward(
        policy, chunk, [&](std::size_t i, std::span<const float> log_p, std::span<float> gradient) {
          kl[begin + i] = ppo::reverse_kl(log_p, {log_q.data() + i * vocabulary, vocabulary}, temperature,
                                          weights[counting[begin + i]], gradient);
        });
  }
  double sum = 0;
  for (std::size_t i = 0; i < kl.size(); ++i) sum += weights[counting[i]] * kl[i];
  return sum;
}

}  // namespace rlhf

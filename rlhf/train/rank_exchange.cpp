#include "rlhf/train/rank_exchange.h"

#include <cstring>
#include <type_traits>

#include "rlhf/core/error.h"

namespace rlhf {
namespace {

// Writes values one behind the other, as this machine has them.
class ByteWriter {
 public:
  static constexpr bool kReads = false;
  std::string bytes;

  template <class T>
  requires(std::is_arithmetic_v<T> || std::is_enum_v<T>) void operator()(T& value) {
    bytes.append(reinterpret_cast<const char*>(&value), sizeof value);
  }
  template <class T>
  void numbers(const T* values, std::size_t count) {
    bytes.append(reinterpret_cast<const char*>(values), count * sizeof(T));
  }
};

// Reads them in the same order.
class ByteReader {
 public:
  static constexpr bool kReads = true;
  explicit ByteReader(const std::string& bytes) : bytes_(bytes) {}

  template <class T>
  requires(std::is_arithmetic_v<T> || std::is_enum_v<T>) void operator()(T& value) { numbers(&value, 1); }
  template <class T>
  void numbers(T* values, std::size_t count) {
    if (count > (bytes_.size() - at_) / sizeof(T)) fail<InternalError>("a rank has sent too few bytes");
    if (count == 0) return;  // memcpy takes no null, not even for nothing
    std::memcpy(static_cast<void*>(values), bytes_.data() + at_, count * sizeof(T));
    at_ += count * sizeof(T);
  }
  bool done() const { return at_ == bytes_.size(); }

 private:
  const std::string& bytes_;
  std::size_t at_ = 0;
};

template <class Archive, class Values>
void pass_size(Archive& archive, Values& values) {
  std::uint64_t size = values.size();
  archive(size);
  if constexpr (Archive::kReads) values.resize(size);
}

template <class Archive, class Values>
void pass_numbers(Archive& archive, Values& values) {
  pass_size(archive, values);
  archive.numbers(values.data(), values.size());
}

template <class Archive>
void pass_sample(Archive& archive, SampleTurn& turn) {
  archive(turn.end);
  archive(turn.reward);
  archive(turn.tool_calls);
  archive(turn.tool_errors);
  archive(turn.seconds);
}

template <class Archive>
void pass_sample(Archive& archive, Sample& sample) {
  archive(sample.prompt_id);
  archive(sample.tag);
  archive(sample.sample_index);
  pass_numbers(archive, sample.tokens);
  pass_numbers(archive, sample.logprobs);
  pass_numbers(archive, sample.weight_versions);
  pass_numbers(archive, sample.mask);
  archive(sample.finish_reason);
  pass_size(archive, sample.turns);
  for (SampleTurn& turn : sample.turns) pass_sample(archive, turn);
  pass_numbers(archive, sample.environment_error);
  archive(sample.answer_begin);
  pass_numbers(archive, sample.raw_logprobs);
  pass_numbers(archive, sample.entropies);
  pass_size(archive, sample.top_logprobs);
  for (auto& row : sample.top_logprobs) pass_numbers(archive, row);
}

// What scoring adds to a response.
template <class Archive>
void pass_scores(Archive& archive, PpoResponse& response) {
  archive(response.judged);
  archive(response.rule_score.total);
  pass_numbers(archive, response.rule_score.terms);
  pass_numbers(archive, response.rule_score.values);
  pass_size(archive, response.rule_score.reasons);
  for (std::string& reason : response.rule_score.reasons) pass_numbers(archive, reason);
  archive(response.rule_score.dropped);
  archive(response.model_score);
  pass_numbers(archive, response.model_outputs);
  ppo::ScoredResponse& scored = response.scored;
  for (auto* values : {&scored.log_probs, &scored.reference_log_probs, &scored.values,
                       &scored.teacher_log_probs, &scored.step_rewards, &scored.sum_pi_squared})
    pass_numbers(archive, *values);
  archive(scored.score);
  archive(scored.greedy_score);
  archive(scored.bootstrap_value);
  archive(scored.unscored);
}

}  // namespace

std::vector<Sample> gather_samples(Collective& collective, std::vector<Sample> own) {
  if (collective.world_size() == 1) return own;
  ByteWriter writer;
  pass_size(writer, own);
  for (Sample& sample : own) pass_sample(writer, sample);
  std::vector<Sample> all;
  const auto texts = collective.all_gather_bytes(writer.bytes);
  for (int r = 0; r < collective.world_size(); ++r) {
    if (r == collective.rank()) {
      for (Sample& sample : own) all.push_back(std::move(sample));
      continue;
    }
    ByteReader reader(texts[static_cast<std::size_t>(r)]);
    std::vector<Sample> theirs;
    pass_size(reader, theirs);
    for (Sample& sample : theirs) {
      pass_sample(reader, sample);
      all.push_back(std::move(sample));
    }
  }
  return all;
}

void exchange_scores(Collective& collective, std::vector<PpoResponse>& responses,
                     std::span<const int> rank_of) {
  ByteWriter writer;
  for (std::size_t i = 0; i < responses.size(); ++i)
    if (rank_of[i] == collective.rank()) pass_scores(writer, responses[i]);
  const auto texts = collective.all_gather_bytes(writer.bytes);
  for (int r = 0; r < collective.world_size(); ++r) {
    if (r == collective.rank()) continue;
    ByteReader reader(texts[static_cast<std::size_t>(r)]);
    for (std::size_t i = 0; i < responses.size(); ++i)
      if (rank_of[i] == r) pass_scores(reader, responses[i]);
  }
}

void add_ranks(Collective& collective, std::map<std::string, double>& numbers) {
  if (collective.world_size() == 1) return;
  ByteWriter writer;
  for (auto [name, value] : numbers) {
    pass_numbers(writer, name);
    writer(value);
  }
  std::map<std::string, double> sums;
  for (const std::string& text : collective.all_gather_bytes(writer.bytes)) {
    ByteReader reader(text);
    while (!reader.done()) {
      std::string name;
      double value = 0;
      pass_numbers(reader, name);
      reader(value);
      sums[name] += value;
    }
  }
  numbers = std::move(sums);
}

}  // namespace rlhf

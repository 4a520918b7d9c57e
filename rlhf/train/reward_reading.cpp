#include "rlhf/train/reward_reading.h"

#include <algorithm>
#include <numeric>
#include <set>

#include "rlhf/core/error.h"

namespace rlhf {

void RewardReadingOptions::validate(config::Problems& problems) const {
  if (!objectives.empty() && target != RewardTarget::kScores)
    problems.add("objectives", "only target: scores has several objectives");
  std::set<std::string> names;
  for (const RewardObjective& objective : objectives) {
    if (objective.name.empty()) problems.add("objectives", "each objective needs a name");
    if (!names.insert(objective.name).second)
      problems.add("objectives", "the name '" + objective.name + "' is given twice");
  }
  if (step_separator.empty()) problems.add("step_separator", "must not be empty");
}

RewardReading::RewardReading(RewardReadingOptions options, const Tokenizer* tokenizer,
                             std::vector<TokenId> end_tokens)
    : options_(std::move(options)), end_tokens_(std::move(end_tokens)) {
  if (!has_steps()) return;
  RLHF_CHECK(tokenizer, "reward.target: steps needs a model with a tokenizer, to find ",
             options_.step_separator);
  tokenizer_.push_back(*tokenizer);
}

std::vector<std::size_t> RewardReading::positions(std::span<const TokenId> tokens,
                                                  std::span<const std::uint8_t> mask) const {
  RLHF_CHECK(!tokens.empty(), "reward model: an empty sequence has no score");
  const std::size_t last = tokens.size() - 1;
  if (!has_steps()) return {last};
  RLHF_CHECK(mask.size() == tokens.size(), "reward model: ", mask.size(), " mask entries for ", tokens.size(),
             " tokens");
  std::string text;
  std::vector<std::size_t> token_at;  // of each byte
  for (std::size_t t = 0; t < tokens.size(); ++t) {
    if (!mask[t] || std::ranges::count(end_tokens_, tokens[t]) > 0) continue;
    text += tokenizer_.front().token_bytes(tokens[t]);
    token_at.resize(text.size(), t);
  }
  std::vector<std::size_t> ends;
  std::size_t begin = 0;
  const std::string& separator = options_.step_separator;
  for (std::size_t at = text.find(separator); at != std::string::npos; at = text.find(separator, begin)) {
    const std::size_t end = token_at[at + separator.size() - 1];
    if (at > begin && (ends.empty() || ends.back() != end)) ends.push_back(end);
    begin = at + separator.size();
  }
  if ((begin < text.size() || ends.empty()) && (ends.empty() || ends.back() != last)) ends.push_back(last);
  return ends;
}

double RewardReading::score(std::span<const double> outputs) const {
  RLHF_CHECK(!outputs.empty() && outputs.size() % num_outputs() == 0, "reward reading: ", outputs.size(),
             " outputs for ", num_outputs(), " objectives");
  if (has_steps()) {
    switch (options_.step_score) {
      case StepScore::kMin:
        return *std::ranges::min_element(outputs);
      case StepScore::kLast:
        return outputs.back();
      case StepScore::kMean:
      case StepScore::kSum:
        break;
    }
    const double sum = std::accumulate(outputs.begin(), outputs.end(), 0.0);
    return options_.step_score == StepScore::kSum ? sum : sum / static_cast<double>(outputs.size());
  }
  if (options_.objectives.empty()) return outputs.front();
  double score = 0;
  for (std::size_t k = 0; k < num_outputs(); ++k) score += options_.objectives[k].weight * outputs[k];
  return score;
}

}  // namespace rlhf

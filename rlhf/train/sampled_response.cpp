#include "rlhf/train/sampled_response.h"

#include <nlohmann/json.hpp>

#include "rlhf/core/error.h"
#include "rlhf/train/generation.h"

namespace rlhf {

void Judges::check(const std::string& stage) const {
  RLHF_CHECK(reward_model_weight == 0 || reward_model, stage, ".reward_model_weight is ", reward_model_weight,
             " but there is no reward model: add the stage 'reward' before '", stage, "'");
  data.rules.check();
  RLHF_CHECK(reward_model_weight != 0 || !data.rules.empty(), stage,
             ": there is neither a rule reward nor a reward model (", stage, ".reward_model_weight is 0)");
}

void Judges::begin(SampledResponse& response) const {
  response.pending = data.rules.begin({*response.prompt, response.sample, response.text});
}

void Judges::judge_by_rules(SampledResponse& response, std::int64_t iteration) const {
  if (response.judged || data.rules.empty()) return;
  response.rule_score =
      data.rules.score({*response.prompt, response.sample, response.text}, iteration, response.pending);
  response.pending.clear();
  response.judged = true;
}

SampledResponse make_sampled_response(const LanguageModel& model, const Prompt& prompt, Sample sample) {
  SampledResponse response;
  response.prompt = &prompt;
  sample.prompt_id = prompt.id;
  if (model.has_tokenizer()) response.text = response_text(model, sample);
  if (sample.answer_begin > 0) response.episode = episode_text(model, sample);
  response.tokens = prompt.tokens;
  response.tokens.insert(response.tokens.end(), sample.tokens.begin(), sample.tokens.end());
  response.sample = std::move(sample);
  return response;
}

namespace {

// A score, or why there is none.
void add_term(const std::string& name, std::size_t term, const Score& score, nlohmann::json& line) {
  if (score.reasons[term].empty())
    line["terms"][name] = score.terms[term];
  else
    line["failed"][name] = score.reasons[term];
}

}  // namespace

std::string to_json_line(const SampledResponse& response, std::int64_t iteration, double score,
                         const Judges& judges) {
  nlohmann::json line = {{"iteration", iteration},
                         {"prompt_id", response.prompt->id},
                         {"task", response.prompt->task},
                         {"prompt", response.prompt->text},
                         {"response", response.text},
                         {"finish_reason", to_string(response.sample.finish_reason)},
                         {"score", score}};
  if (!response.episode.empty()) line["episode"] = response.episode;
  if (!response.sample.environment_error.empty())
    line["environment_error"] = response.sample.environment_error;
  for (std::size_t t = 0; t < response.rule_score.terms.size(); ++t)
    add_term(judges.data.rules.names()[t], t, response.rule_score, line);
  if (judges.reward_model_weight != 0) line["reward_model"] = response.model_score;
  return line.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

}  // namespace rlhf

#include "rlhf/train/evaluation.h"

#include <algorithm>
#include <deque>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>
#include <sstream>

#include "rlhf/core/atomic_file.h"
#include "rlhf/core/error.h"
#include "rlhf/train/build_task.h"
#include "rlhf/train/divergence.h"
#include "rlhf/train/reward_rating.h"

namespace rlhf {

namespace {

// Tasks in order of first appearance, with the indices of their responses.
std::vector<std::pair<std::string, std::vector<std::size_t>>> by_task(
    const std::vector<JudgedResponse>& responses) {
  std::vector<std::pair<std::string, std::vector<std::size_t>>> groups;
  for (std::size_t i = 0; i < responses.size(); ++i) {
    const std::string& task = responses[i].prompt->task;
    auto group = std::ranges::find(groups, task, &std::pair<std::string, std::vector<std::size_t>>::first);
    if (group == groups.end()) group = groups.insert(groups.end(), {task, {}});
    group->second.push_back(i);
  }
  return groups;
}

// The first responses of each task.
std::vector<JudgedResponse*> first_of_each_task(Evaluation& evaluation, std::int64_t cases_per_task) {
  std::vector<JudgedResponse*> chosen;
  for (const auto& [task, indices] : by_task(evaluation.responses)) {
    const std::size_t limit = cases_per_task == 0 ? indices.size() : static_cast<std::size_t>(cases_per_task);
    for (std::size_t i = 0; i < std::min(limit, indices.size()); ++i)
      chosen.push_back(&evaluation.responses[indices[i]]);
  }
  return chosen;
}

// Mean of what some of the responses have; none when no response has it.
std::optional<double> mean_of(const Evaluation& evaluation, const std::vector<std::size_t>& indices,
                              std::optional<double> JudgedResponse::*value) {
  double sum = 0, count = 0;
  for (const std::size_t i : indices)
    if (const auto& found = evaluation.responses[i].*value) {
      sum += *found;
      ++count;
    }
  return count > 0 ? std::optional(sum / count) : std::nullopt;
}

TaskScore summarise(const std::string& task, const std::vector<std::size_t>& indices,
                    const Evaluation& evaluation) {
  TaskScore result;
  result.task = task;
  result.count = static_cast<std::int64_t>(indices.size());
  std::vector<double> scores;
  double formed = 0;
  const double share = 1 / static_cast<double>(indices.size());
  for (std::size_t i : indices) {
    const JudgedResponse& response = evaluation.responses[i];
    scores.push_back(response.score);
    result.accuracy += share * (response.score >= 1);
    if (response.well_formed) formed += share * *response.well_formed;
    result.eos_rate += share * response.ended;
    result.mean_length += share * static_cast<double>(response.tokens.size());
  }
  result.score = std::accumulate(scores.begin(), scores.end(), 0.0) * share;
  result.interval = bootstrap_mean_interval(scores, 0xb007);
  if (evaluation.responses[indices.front()].well_formed) result.well_formed_rate = formed;
  result.model_score = mean_of(evaluation, indices, &JudgedResponse::model_score);
  result.kl = mean_of(evaluation, indices, &JudgedResponse::kl);
  return result;
}

// A response that was read back has no mask: all of it counts.
ScoredText with_prompt(const JudgedResponse& response) {
  ScoredText text{response.prompt->tokens, std::vector<std::uint8_t>(response.prompt->tokens.size(), 0)};
  text.tokens.insert(text.tokens.end(), response.tokens.begin(), response.tokens.end());
  text.mask.insert(text.mask.end(), response.mask.begin(), response.mask.end());
  text.mask.resize(text.tokens.size(), 1);
  return text;
}

void summarise_tasks(Evaluation& evaluation) {
  evaluation.tasks.clear();
  for (const auto& [task, indices] : by_task(evaluation.responses))
    evaluation.tasks.push_back(summarise(task, indices, evaluation));
}

// The first prompts of each task, in the order of the prompts.
std::vector<const Prompt*> asked_prompts(const TaskData& data, std::int64_t cases_per_task) {
  std::map<std::string, std::int64_t> taken;
  std::vector<const Prompt*> asked;
  for (const Prompt& prompt : data.eval_prompts)
    if (cases_per_task == 0 || taken[prompt.task]++ < cases_per_task) asked.push_back(&prompt);
  return asked;
}

// Terms that wait for something wait for all answers at once.
std::vector<double> rule_scores(const RewardComposition& rules, const std::vector<ScoredSample>& answers) {
  std::vector<PendingScore> pending;
  for (const ScoredSample& answer : answers) pending.push_back(rules.begin(answer));
  std::vector<double> scores;
  for (std::size_t i = 0; i < answers.size(); ++i)
    scores.push_back(rules.score(answers[i], {}, pending[i]).total);
  return scores;
}

void score_by_rules(const RewardComposition& rules, const std::vector<Sample>& samples,
                    Evaluation& evaluation) {
  std::vector<ScoredSample> answers;
  for (std::size_t i = 0; i < samples.size(); ++i)
    answers.push_back({*evaluation.responses[i].prompt, samples[i], evaluation.responses[i].text});
  const std::vector<double> scores = rule_scores(rules, answers);
  for (std::size_t i = 0; i < scores.size(); ++i) evaluation.responses[i].score = scores[i];
}

}  // namespace

Evaluation evaluate(const std::string& name, const LanguageModel& model, const TaskData& data,
                    const RolloutOptions& rollout, const EvaluationSize& size, const StageContext& context) {
  RLHF_CHECK(!data.eval_prompts.empty(), "eval: there are no held-out prompts");
  const std::vector<const Prompt*> asked = asked_prompts(data, size.cases_per_task);
  Stopwatch watch;
  auto engine = make_engine(model, {rollout, data.eval_prompts, context.compute, context.max_blocks});
  std::vector<GenerationRequest> requests;
  for (const Prompt* prompt : asked) {
    requests.push_back(make_request(*prompt, rollout, model, data));
    requests.back().num_samples = size.draws;
    requests.back().seed = 0xe7a1;
    requests.back().prompt_id = requests.size() - 1;
  }
  const auto samples =
      generate_all(*context.collective, *engine, model.parameters().weights(), 0, std::move(requests));
  engine.reset();
  Evaluation evaluation;
  evaluation.name = name;
  for (const Sample& sample : samples) {
    JudgedResponse response;
    response.prompt = asked[sample.prompt_id];
    response.text = response_text(model, sample);
    if (data.is_well_formed) response.well_formed = data.is_well_formed(*response.prompt, response.text);
    response.ended = sample.finish_reason == FinishReason::kStop;
    response.tokens = sample.tokens;
    response.mask = sample.mask;
    evaluation.responses.push_back(std::move(response));
  }
  if (context.collective->is_first()) score_by_rules(data.rules, samples, evaluation);
  summarise_tasks(evaluation);
  evaluation.seconds = watch.seconds();
  return evaluation;
}

void add_model_scores(Evaluation& evaluation, const Parameters<float>& reward_model,
                      const RewardReading& reading, std::int64_t cases_per_task,
                      const StageContext& context) {
  const auto chosen = first_of_each_task(evaluation, cases_per_task);
  std::vector<TrainingExample> answers;
  for (const JudgedResponse* response : chosen) {
    const ScoredText text = with_prompt(*response);
    answers.push_back({text.tokens, text.mask});
  }
  SequencePass<float> pass(reward_model.config(), context.compute);
  const auto outputs = read_outputs(pass, reward_model.weights(), reading, answers, 2048);
  for (std::size_t i = 0; i < chosen.size(); ++i) chosen[i]->model_score = reading.score(outputs[i]);
  summarise_tasks(evaluation);
}

void add_kl(Evaluation& evaluation, const Parameters<float>& policy, const Parameters<float>& reference,
            std::int64_t cases_per_task, const StageContext& context) {
  const auto chosen = first_of_each_task(evaluation, cases_per_task);
  std::vector<ScoredText> texts;
  for (const JudgedResponse* response : chosen) texts.push_back(with_prompt(*response));
  const auto kl =
      policy_kl(policy.config(), policy.weights(), reference.weights(), texts, 2048, context.compute);
  for (std::size_t i = 0; i < kl.size(); ++i) chosen[i]->kl = kl[i];
  summarise_tasks(evaluation);
}

double score_constant_answer(const TaskData& data, const TaskBaseline& baseline, const LanguageModel& model) {
  std::deque<Sample> samples;
  std::deque<std::string> texts;
  std::vector<ScoredSample> answers;
  const EpisodeRunner* environment = data.environment(baseline.task);
  for (const Prompt& prompt : data.eval_prompts) {
    if (prompt.task != baseline.task) continue;
    const TrainingExample example = make_example(model, prompt.tokens, baseline.answer, environment);
    Sample& sample = samples.emplace_back();
    sample.tokens.assign(example.tokens.begin() + static_cast<std::ptrdiff_t>(prompt.tokens.size()),
                         example.tokens.end());
    sample.mask.assign(sample.tokens.size(), 1);
    answers.push_back({prompt, sample, texts.emplace_back(response_text(model, sample))});
  }
  const std::vector<double> scores = rule_scores(data.rules, answers);
  const double sum = std::accumulate(scores.begin(), scores.end(), 0.0);
  return scores.empty() ? 0 : sum / static_cast<double>(scores.size());
}

double PairedScores::mean_difference() const {
  double sum = 0;
  for (std::size_t i = 0; i < after.size(); ++i) sum += after[i] - before[i];
  return sum / static_cast<double>(std::max<std::size_t>(1, after.size()));
}

PairedScores paired_scores(const Evaluation& before, const Evaluation& after, const std::string& task) {
  std::map<const Prompt*, double> known;
  for (const JudgedResponse& response : before.responses) known.emplace(response.prompt, response.score);
  PairedScores scores;
  for (const JudgedResponse& response : after.responses) {
    const auto found = known.find(response.prompt);
    if (response.prompt->task != task || found == known.end()) continue;
    scores.before.push_back(found->second);
    scores.after.push_back(response.score);
  }
  return scores;
}

double mean_score(const Evaluation& evaluation) {
  double sum = 0;
  for (const JudgedResponse& response : evaluation.responses) sum += response.score;
  return sum / static_cast<double>(std::max<std::size_t>(1, evaluation.responses.size()));
}

void save_evaluation(const std::filesystem::path& path, const Evaluation& evaluation) {
  std::string text;
  for (const JudgedResponse& response : evaluation.responses) {
    nlohmann::json line = {{"prompt_id", response.prompt->id},
                           {"task", response.prompt->task},
                           {"prompt", response.prompt->text},
                           {"response", response.text},
                           {"reference", response.prompt->reference},
                           {"score", response.score},
                           {"ended", response.ended},
                           {"output_ids", response.tokens}};
    if (response.well_formed) line["well_formed"] = *response.well_formed;
    if (response.model_score) line["reward_model"] = *response.model_score;
    if (response.kl) line["kl"] = *response.kl;
    text += line.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
  }
  write_file_atomically(path, text);
}

Evaluation load_evaluation(const std::filesystem::path& path, const std::string& name, const TaskData& data,
                           std::int64_t cases_per_task) {
  const std::vector<const Prompt*> asked = asked_prompts(data, cases_per_task);
  Evaluation evaluation;
  evaluation.name = name;
  std::istringstream lines(read_text_file(path));
  for (std::string line; std::getline(lines, line);) {
    try {
      const auto json = nlohmann::json::parse(line);
      JudgedResponse response;
      // Responses are in the order of the prompts, whose ids need not be unique.
      response.prompt = asked.at(evaluation.responses.size());
      const PromptId id = json.at("prompt_id");
      if (id != response.prompt->id) fail<IoError>("prompt_id is ", id, ", expected ", response.prompt->id);
      response.text = json.at("response");
      response.score = json.at("score");
      response.ended = json.at("ended");
      response.tokens = json.at("output_ids").get<std::vector<TokenId>>();
      if (json.contains("well_formed")) response.well_formed = json["well_formed"].get<bool>();
      if (json.contains("kl")) response.kl = json["kl"].get<double>();
      if (json.contains("reward_model")) response.model_score = json["reward_model"].get<double>();
      evaluation.responses.push_back(std::move(response));
    } catch (const std::exception& error) {
      fail<IoError>(path.string(), ":", evaluation.responses.size() + 1,
                    ": not a judged response of this run: ", error.what());
    }
  }
  if (evaluation.responses.size() != asked.size())
    fail<IoError>(path.string(), ": holds ", evaluation.responses.size(), " responses, the run asks for ",
                  asked.size());
  summarise_tasks(evaluation);
  return evaluation;
}

}  // namespace rlhf

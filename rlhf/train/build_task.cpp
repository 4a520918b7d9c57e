#include "rlhf/train/build_task.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "reward/remote/http_reward.h"
#include "reward/rules/finance_rules.h"
#include "reward/rules/text_rules.h"
#include "rlhf/core/error.h"
#include "rlhf/data/finance_desk/desk.h"
#include "rlhf/data/random_walks.h"
#include "rlhf/train/build_environment.h"
#include "rollout/environment/calculator.h"

namespace rlhf {
namespace {

/// trlX's random walks as a reward: the prompt is the start letter.
class RandomWalkReward : public RewardTerm {
 public:
  std::string_view name() const override { return "random_walk"; }
  double score(const ScoredSample& scored) const override {
    return random_walks::reward(scored.prompt.text.at(0), scored.text);
  }
};

/// What an environment gave for the turns of an episode, together.
class EnvironmentReward : public RewardTerm {
 public:
  std::string_view name() const override { return "environment"; }
  double score(const ScoredSample& scored) const override {
    double sum = 0;
    for (const SampleTurn& turn : scored.sample.turns) sum += turn.reward;
    return sum;
  }
};

std::unique_ptr<RewardTerm> make_rule(const RewardSection& section) {
  using Type = RewardSection::Type;
  switch (section.type) {
    case Type::kFinance:
      return std::make_unique<finance::FinanceReward>();
    case Type::kRandomWalk:
      return std::make_unique<RandomWalkReward>();
    case Type::kExactMatch:
      return std::make_unique<ExactMatch>();
    case Type::kF1:
      return std::make_unique<F1Match>();
    case Type::kNumber:
      return std::make_unique<NumberMatch>(NumberMatch::Tolerance{section.relative_tolerance, 1e-9});
    case Type::kRegex:
      return std::make_unique<RegexMatch>(section.pattern);
    case Type::kFormat: {
      FormatDemands demands;
      demands.prefix = section.prefix;
      demands.suffix = section.suffix;
      return std::make_unique<FormatRule>(std::move(demands));
    }
    case Type::kLength:
      return std::make_unique<LengthRule>(LengthRule::Range{static_cast<std::size_t>(section.min_tokens),
                                                            static_cast<std::size_t>(section.max_tokens),
                                                            static_cast<std::size_t>(section.slope_tokens)});
    case Type::kEnvironment:
      return std::make_unique<EnvironmentReward>();
    case Type::kHttp:
      return std::make_unique<HttpReward>(*section.http);
  }
  fail<InternalError>("unknown reward type");
}

void add_rules(const RunOptions& options, TaskData& data) {
  for (const RewardSection& section : options.rewards) {
    data.rules.add(make_rule(section), section.term);
  }
  if (!options.rewards.empty()) return;
  if (options.data.source == DataSource::kFinanceDesk)
    data.rules.add(std::make_unique<finance::FinanceReward>(), {});
  if (options.data.source == DataSource::kRandomWalks)
    data.rules.add(std::make_unique<RandomWalkReward>(), {});
}

void append(std::vector<TokenId>& tokens, const std::vector<TokenId>& more) {
  tokens.insert(tokens.end(), more.begin(), more.end());
}

Prompt make_prompt(const LanguageModel& model, const finance::Case& item) {
  Prompt prompt;
  prompt.id = item.id;
  prompt.tokens = model.encode_chat(item.prompt(), &prompt.text);
  prompt.task = finance::to_string(item.kind);
  prompt.reference = item.reference;
  return prompt;
}

void build_finance_desk(const RunOptions& options, const LanguageModel& model, TaskData& data) {
  using finance::Split;
  const DataSection& section = options.data;
  const std::uint64_t seed = options.run.seed;
  const auto count = [](std::int64_t n) { return static_cast<std::size_t>(n); };
  for (const std::string& name : section.kinds) {
    const finance::Kind kind = finance::kind_from_string(name);
    if (kind == finance::Kind::kCalculation)
      data.environments[name] = std::make_shared<EpisodeRunner>(
          std::make_shared<CalculatorTagFactory>(), observation_encoder(model), EpisodeRunnerOptions{});
    const EpisodeRunner* environment = data.environment(name);
    const auto demonstrations = finance::make_cases(kind, Split::kTrain, count(section.sft_cases),
                                                    seed * 4 + 1, section.sft_templates);
    for (const finance::Case& item : demonstrations)
      data.demonstrations.push_back(
          make_example(model, model.encode_chat(item.prompt()), item.answer, environment));
    const auto pairs = [&](Split split, std::size_t cases, std::uint64_t pair_seed,
                           std::vector<TrainingPair>& out) {
      for (const finance::Case& item : finance::make_cases(kind, split, cases, pair_seed)) {
        const auto prompt = model.encode_chat(item.prompt());
        const TrainingExample gold = make_example(model, prompt, item.answer, environment);
        for (const finance::Corruption& wrong : finance::corruptions(item, pair_seed + item.id))
          out.push_back({gold, make_example(model, prompt, wrong.text, environment), 0, name});
      }
    };
    if (options.needs_pairs()) {
      pairs(Split::kTrain, count(section.pair_cases), seed * 4 + 2, data.train_pairs);
      pairs(Split::kHeldOut, count(section.held_out_pair_cases), seed * 4 + 2, data.held_out_pairs);
    }
    if (options.needs_prompts())
      for (const finance::Case& item :
           finance::make_cases(kind, Split::kTrain, count(section.prompt_cases), seed * 4 + 3))
        data.train_prompts.push_back(make_prompt(model, item));
    // The held-out cases do not depend on the run's seed: runs are compared on the same exam.
    if (options.has_stage(Stage::kEval))
      for (const finance::Case& item :
           finance::make_cases(kind, Split::kHeldOut, count(section.eval_cases), 0))
        data.eval_prompts.push_back(make_prompt(model, item));
    if (!demonstrations.empty())
      for (const finance::Baseline& baseline : finance::trivial_baselines(demonstrations))
        data.baselines.push_back({name, baseline.name, baseline.answer});
  }
  data.is_well_formed = [](const Prompt& prompt, std::string_view text) {
    return finance::is_well_formed(finance::kind_from_string(prompt.task), text);
  };
}

void build_random_walks(const RunOptions& options, const LanguageModel& model, TaskData& data) {
  for (const std::string& walk :
       random_walks::make_walks(static_cast<std::size_t>(options.data.sft_cases), options.run.seed)) {
    TrainingExample example;
    example.tokens = model.tokenizer().encode(walk);
    example.tokens.push_back(model.end_token());
    example.loss_mask.assign(example.tokens.size(), 1);
    data.demonstrations.push_back(std::move(example));
  }
  for (char start : random_walks::start_nodes()) {
    Prompt prompt;
    prompt.id = static_cast<PromptId>(start);
    prompt.text = std::string(1, start);
    prompt.tokens = model.tokenizer().encode(prompt.text);
    prompt.task = "random_walks";
    data.train_prompts.push_back(prompt);
    data.eval_prompts.push_back(prompt);
  }
}

std::vector<TokenId> encode_prompt(const LanguageModel& model, const PromptContent& content,
                                   const nlohmann::ordered_json& tools, std::string& text) {
  if (!content.input_ids.empty()) return content.input_ids;
  if (!content.messages.empty()) {
    text = render_chat_with_tools(model, content.messages, true, tools);
    return model.tokenizer().encode(text);
  }
  text = content.text;
  return model.tokenizer().encode(text);
}

// Loss on every assistant turn. Turn boundaries come from rendering growing prefixes of the chat, so any
// template whose rendering of a prefix is a prefix of the rendering works; others are refused rather than
// trained wrongly.
TrainingExample make_chat_example(const LanguageModel& model, const SftRecord& record,
                                  const nlohmann::ordered_json& tools, const std::string& file) {
  TrainingExample example;
  std::string done;
  for (std::size_t i = 0; i < record.messages.size(); ++i) {
    if (record.messages[i].role != "assistant") continue;
    const auto turn = record.messages.begin() + static_cast<std::ptrdiff_t>(i);
    const std::string before = render_chat_with_tools(model, {record.messages.begin(), turn}, true, tools);
    const std::string after =
        render_chat_with_tools(model, {record.messages.begin(), turn + 1}, false, tools);
    if (!before.starts_with(done) || !after.starts_with(before))
      fail<InvalidArgument>(
          file, ":", record.line, ": the chat template does not render turn ", i + 1,
          " as a continuation of the turns before; loss on answers only is not possible with it");
    append(example.tokens, model.tokenizer().encode(std::string_view(before).substr(done.size())));
    example.loss_mask.resize(example.tokens.size(), 0);
    append(example.tokens, model.tokenizer().encode(std::string_view(after).substr(before.size())));
    example.loss_mask.resize(example.tokens.size(), 1);
    done = after;
  }
  return example;
}

// @return the schemas of the tools that prompts announce
nlohmann::ordered_json build_environments(const RunOptions& options, const LanguageModel& model,
                                          const OwnEnvironment& own, TaskData& data) {
  auto tools = nlohmann::ordered_json::array();
  if (!options.rollout.environment && own.empty()) return tools;
  const EnvironmentOptions environment = options.rollout.environment.value_or(EnvironmentOptions{});
  std::shared_ptr<const EnvironmentFactory> factory = own.environment;
  if (!factory) {
    const auto with_tools = build_environment(environment, own.tools);
    tools = with_tools->schemas();
    factory = with_tools;
  }
  data.environments[""] = build_episodes(environment, factory, model);
  return tools;
}

// Numbers of an answer at the tokens where the reward model is to say them.
RatedExample make_rated(const RewardReading& reading, const RatedResponse& record, TrainingExample example,
                        const std::string& file) {
  const std::string where = concat(file, ":", record.line, ": ");
  const RewardReadingOptions& options = reading.options();
  if (record.per_step != reading.has_steps())
    fail<InvalidArgument>(where, reading.has_steps() ? "expected \"step_scores\", as reward.target is steps"
                                                     : "\"step_scores\" need reward.target: steps");
  RatedExample rated{std::move(example), {}, record.scores};
  rated.positions = reading.positions(rated.example.tokens, rated.example.loss_mask);
  if (reading.has_steps() && rated.positions.size() != record.scores.size())
    fail<InvalidArgument>(where, record.scores.size(), " step_scores for a response of ",
                          rated.positions.size(), " steps, which reward.step_separator ",
                          nlohmann::json(options.step_separator).dump(), " ends");
  if (!reading.has_steps() && record.scores.size() != reading.num_outputs())
    fail<InvalidArgument>(where, record.scores.size(), " scores, expected ", reading.num_outputs(),
                          " (reward.objectives)");
  return rated;
}

void build_files(const RunOptions& options, const LanguageModel& model, const OwnEnvironment& own,
                 TaskData& data) {
  const DataSection& section = options.data;
  const std::int64_t context = model.config().max_positions;
  const nlohmann::ordered_json tools = build_environments(options, model, own, data);
  const auto check_length = [&](std::size_t tokens, const std::string& file, std::int64_t line) {
    if (static_cast<std::int64_t>(tokens) > context)
      fail<InvalidArgument>(file, ":", line, ": has ", tokens, " tokens, the model's context is ", context);
  };
  if (options.has_stage(Stage::kSft) || options.has_stage(Stage::kPretrain))
    for (const SftRecord& record : read_sft_records(section.sft_file, section.prompt_text)) {
      data.demonstrations.push_back(
          record.messages.empty()
              ? make_example(model, model.tokenizer().encode(record.prompt), record.response, nullptr)
              : make_chat_example(model, record, tools, section.sft_file));
      check_length(data.demonstrations.back().tokens.size(), section.sft_file, record.line);
    }
  const auto side = [&](const RankedResponse& ranked, const std::string& file, std::int64_t line) {
    std::string text;
    auto example =
        make_example(model, encode_prompt(model, ranked.prompt, tools, text), ranked.response, nullptr);
    check_length(example.tokens.size(), file, line);
    return example;
  };
  const auto pairs = [&](const std::string& file, std::vector<TrainingPair>& out) {
    for (const PreferencePair& pair : read_preference_pairs(file, section.prompt_text))
      out.push_back(
          {side(pair.chosen, file, pair.line), side(pair.rejected, file, pair.line), pair.margin, pair.task});
  };
  if (options.needs_pairs()) pairs(section.pairs_file, data.train_pairs);
  const auto ratings = [&](const std::string& file, std::vector<RatedExample>& out) {
    for (const RatedResponse& record : read_rated_responses(file, section.prompt_text))
      out.push_back(make_rated(data.reward_reading, record, side(record.answer, file, record.line), file));
  };
  if (options.needs_ratings()) ratings(section.ratings_file, data.train_ratings);
  if (options.needs_ratings() && !section.held_out_ratings_file.empty())
    ratings(section.held_out_ratings_file, data.held_out_ratings);
  if ((options.has_stage(Stage::kReward) || options.needs_pairs() || options.has_labels()) &&
      !section.held_out_pairs_file.empty())
    pairs(section.held_out_pairs_file, data.held_out_pairs);
  if (options.has_labels())
    for (const LabelledResponse& record : read_labelled_responses(section.labels_file, section.prompt_text))
      data.labelled.push_back({side(record.answer, section.labels_file, record.line), record.desirable});
  const auto prompts = [&](const std::string& file, std::vector<Prompt>& out) {
    for (const PromptRecord& record : read_prompt_records(file, section.prompt_text)) {
      Prompt prompt;
      prompt.id = record.id;
      prompt.tokens = encode_prompt(model, record.content, tools, prompt.text);
      prompt.user_turns = record.user_turns;
      prompt.task = record.task.empty() ? "default" : record.task;
      prompt.reference = record.reference;
      check_length(prompt.tokens.size() + 1, file, record.line);
      for (TokenId token : prompt.tokens)
        if (token >= model.config().vocab_size)
          fail<InvalidArgument>(file, ":", record.line, ": token id ", token,
                                " is outside the model's vocabulary of ", model.config().vocab_size);
      out.push_back(std::move(prompt));
    }
  };
  if (options.needs_prompts()) prompts(section.prompts_file, data.train_prompts);
  if (options.has_stage(Stage::kEval)) prompts(section.eval_file, data.eval_prompts);
}

}  // namespace

const EpisodeRunner* TaskData::environment(const std::string& task) const {
  auto found = environments.find(task);
  if (found == environments.end()) found = environments.find("");
  return found == environments.end() ? nullptr : found->second.get();
}

TrainingExample make_example(const LanguageModel& model, const std::vector<TokenId>& prompt,
                             std::string_view response, const EpisodeRunner* environment) {
  TrainingExample example;
  example.tokens = prompt;
  example.loss_mask.assign(prompt.size(), 0);
  append(example.tokens, model.tokenizer().encode(response));
  example.loss_mask.resize(example.tokens.size(), 1);
  const auto occurs = [&](const std::string& text) { return response.find(text) != std::string_view::npos; };
  if (environment && std::ranges::any_of(environment->factory().turn_strings(), occurs)) {
    const Prompt nothing;
    const Observation said =
        environment->factory().begin({nothing})->observe({.text = response, .tokens = {}, .limit = {}});
    append(example.tokens, observation_encoder(model)(said, TokenId{-1}));
    example.loss_mask.resize(example.tokens.size(), 0);
  }
  example.tokens.push_back(model.end_token());
  example.loss_mask.push_back(1);
  return example;
}

LanguageModel load_policy(const RunOptions& options) {
  const ModelSection& section = options.model;
  if (section.new_model)
    return LanguageModel::create(*section.new_model, section.trainable, options.run.seed);
  return LanguageModel::load(section.path, section.trainable);
}

TaskData build_task(const RunOptions& options, const LanguageModel& model, const OwnEnvironment& own) {
  RLHF_CHECK(own.empty() || options.data.source == DataSource::kFiles,
             "an environment needs data.source: files");
  TaskData data;
  data.reward_reading = RewardReading(
      options.reward.reading, model.has_tokenizer() ? &model.tokenizer() : nullptr, model.end_tokens());
  switch (options.data.source) {
    case DataSource::kFinanceDesk:
      build_finance_desk(options, model, data);
      break;
    case DataSource::kRandomWalks:
      build_random_walks(options, model, data);
      break;
    case DataSource::kFiles:
      build_files(options, model, own, data);
      break;
  }
  add_rules(options, data);
  return data;
}

}  // namespace rlhf

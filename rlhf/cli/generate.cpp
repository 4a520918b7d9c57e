#include <algorithm>
#include <iostream>
#include <memory>
#include <span>

#include "rlhf/cli/generation_fields.h"
#include "rlhf/cli/jsonl_input.h"
#include "rlhf/cli/model_arguments.h"
#include "rlhf/cli/verbs.h"
#include "rlhf/config/reader.h"
#include "rlhf/core/error.h"
#include "rlhf/train/build_environment.h"
#include "rlhf/train/generation.h"
#include "rollout/engine/check_request.h"

namespace rlhf::cli {
namespace {

struct GenerateArguments {
  std::string model, input, output = "-";
  std::int64_t max_sequences = 32, max_tokens_per_step = 0, cache_blocks = 0, draft_rows = 12;
  WeightFormat weights = WeightFormat::kFp32;
  KvFormat kv = KvFormat::kAuto;
  bool statistics = false;
  int threads = 0;
  Device device = Device::kAuto;
  double min_p = -1;
  bool ignore_eos = false;
  std::vector<TokenId> stop_token_ids;
  std::vector<std::string> choices;
  std::string environment;
  GenerationRequest request;  // what every line begins with
};

// What answers the turns of all lines.
struct Answerer {
  std::shared_ptr<const EpisodeRunner> episodes;
  nlohmann::ordered_json tools = nlohmann::ordered_json::array();
};

Answerer make_answerer(const std::string& file, const LanguageModel& model) {
  Answerer answerer;
  if (file.empty()) return answerer;
  const auto options = config::load<EnvironmentOptions>(file);
  const auto factory = build_environment(options);
  answerer.tools = factory->schemas();
  answerer.episodes = build_episodes(options, factory, model);
  return answerer;
}

// Messages announce the tools; other prompts are taken as they are.
Prompt read_prompt(const Answerer& answerer, const LanguageModel& model, const nlohmann::json& line,
                   const std::string& where) {
  Prompt prompt;
  try {
    if (line.contains("user_turns")) prompt.user_turns = line["user_turns"].get<std::vector<std::string>>();
    if (!answerer.tools.empty() && line.contains("messages") && !line.contains("input_ids")) {
      prompt.text = render_chat_with_tools(model, chat_from_json(line["messages"]), true, answerer.tools);
      prompt.tokens = model.tokenizer().encode(prompt.text);
      return prompt;
    }
  } catch (const std::exception& error) {
    fail<IoError>(where, ": ", error.what());
  }
  prompt.tokens = tokens_of_line(model, line, where, Turn::kOpen);
  return prompt;
}

GenerationRequest base_request(const GenerateArguments& arguments, const LanguageModel& model) {
  GenerationRequest request = arguments.request;
  if (arguments.min_p >= 0) request.sampling.min_p = arguments.min_p;
  if (!arguments.ignore_eos) request.stop.tokens = model.end_tokens();
  request.stop.tokens.insert(request.stop.tokens.end(), arguments.stop_token_ids.begin(),
                             arguments.stop_token_ids.end());
  for (const std::string& choice : arguments.choices)
    request.constraint.choices.push_back(choice_tokens(model, choice, "--choice"));
  return request;
}

void check(const GenerationRequest& request, const LanguageModel& model, const std::string& where) {
  if (request.prompt.empty()) fail<IoError>(where, ": the prompt is empty");
  if (static_cast<std::int64_t>(request.prompt.size()) >= model.config().max_positions)
    fail<IoError>(where, ": the prompt has ", request.prompt.size(),
                  " tokens, which leaves no room in the model's context of ", model.config().max_positions);
  for (TokenId token : request.prompt)
    if (token < 0 || token >= model.config().vocab_size)
      fail<IoError>(where, ": token id ", token, " is outside the vocabulary of ", model.config().vocab_size);
  try {
    check_request(request, model.config(), model.has_tokenizer());
  } catch (const InvalidArgument& error) {
    fail<IoError>(where, ": ", error.what());
  }
}

std::vector<GenerationRequest> read_requests(const GenerateArguments& arguments, const LanguageModel& model,
                                             const Answerer& answerer) {
  const GenerationRequest base = base_request(arguments, model);
  std::vector<GenerationRequest> requests;
  for_each_json_line(arguments.input, [&](std::int64_t number, const nlohmann::json& line) {
    const std::string where = concat(arguments.input, ":", number);
    GenerationRequest request = base;
    Prompt prompt = read_prompt(answerer, model, line, where);
    prompt.id = request.prompt_id = requests.size();
    request.prompt = prompt.tokens;
    if (answerer.episodes) request.turns = answerer.episodes->handler(prompt);
    apply_generation_fields(model, line, where, request);
    check(request, model, where);
    requests.push_back(std::move(request));
  });
  return requests;
}

// By default all samples that decode at once fit at their longest; with --cache-blocks they may be preempted.
RolloutEngineOptions engine_options(const GenerateArguments& arguments, const LanguageModel& model,
                                    const std::vector<GenerationRequest>& requests) {
  std::int64_t longest = 1, samples = 0;
  for (const GenerationRequest& request : requests) {
    const auto length = static_cast<std::int64_t>(request.prompt.size()) + request.stop.max_new_tokens;
    longest = std::max(longest, std::min(model.config().max_positions, length));
    samples += request.num_samples;
  }
  RolloutEngineOptions options;
  options.max_sequences = std::min(arguments.max_sequences, samples);
  options.max_tokens_per_step = arguments.max_tokens_per_step;
  options.max_draft_rows = arguments.draft_rows;
  options.kv = arguments.kv;
  options.num_blocks = arguments.cache_blocks > 0
                           ? arguments.cache_blocks
                           : RolloutEngine::blocks_for(options.max_sequences + 1, longest);
  return options;
}

nlohmann::json pairs_of(const std::vector<std::vector<TokenLogProb>>& positions) {
  auto out = nlohmann::json::array();
  for (const auto& position : positions) {
    auto pairs = nlohmann::json::array();
    for (const auto& [token, log_prob] : position) pairs.push_back({token, log_prob});
    out.push_back(pairs);
  }
  return out;
}

nlohmann::json turns_of(const Sample& sample) {
  auto turns = nlohmann::json::array();
  for (const SampleTurn& turn : sample.turns)
    turns.push_back({{"end", turn.end},
                     {"reward", turn.reward},
                     {"tool_calls", turn.tool_calls},
                     {"tool_errors", turn.tool_errors}});
  return turns;
}

nlohmann::json line_of(const LanguageModel& model, const GenerationRequest& request,
                       std::span<const Sample> samples) {
  const OutputOptions& output = request.output;
  nlohmann::json line;
  for (const Sample& sample : samples) {
    line["output_ids"].push_back(sample.tokens);
    line["text"].push_back(model.has_tokenizer() ? response_text(model, sample) : "");
    line["logprobs"].push_back(sample.logprobs);
    line["finish_reason"].push_back(to_string(sample.finish_reason));
    if (request.turns) {
      line["episode"].push_back(episode_text(model, sample));
      line["mask"].push_back(sample.mask);
      line["turns"].push_back(turns_of(sample));
      line["environment_error"].push_back(sample.environment_error);
    }
    if (output.raw_logprobs) line["raw_logprobs"].push_back(sample.raw_logprobs);
    if (output.entropies) line["entropies"].push_back(sample.entropies);
    if (output.top_logprobs > 0) line["top_logprobs"].push_back(pairs_of(sample.top_logprobs));
  }
  return line;
}

nlohmann::ordered_json line_of(const GenerationStatistics& statistics) {
  return {{"seconds", statistics.seconds},
          {"steps", statistics.steps},
          {"tokens", statistics.decode_tokens},
          {"tokens_per_s", static_cast<double>(statistics.decode_tokens) / statistics.seconds},
          {"prefill_tokens", statistics.prefill_tokens},
          {"cached_prefix_tokens", statistics.cached_prefix_tokens},
          {"draft_tokens", statistics.draft_tokens},
          {"accepted_drafts", statistics.accepted_drafts},
          {"preemptions", statistics.preemptions}};
}

void generate(const GenerateArguments& arguments) {
  LoadedModel loaded(arguments.model, arguments.threads, arguments.device);
  check_kv_dtype(arguments.kv, loaded);
  const LanguageModel& model = loaded.model;
  const Answerer answerer = make_answerer(arguments.environment, model);
  const std::vector<GenerationRequest> requests = read_requests(arguments, model, answerer);
  std::function<std::string(TokenId)> bytes;
  if (model.has_tokenizer()) bytes = [&](TokenId id) { return model.tokenizer().token_bytes(id); };
  RolloutEngine engine(model.config(), loaded.compute, engine_options(arguments, model, requests), bytes);
  const GenerationWeights weights(arguments.weights, loaded);
  const auto samples = generate_all(engine, weights.get(), 0, requests);
  LineWriter writer(arguments.output);
  std::span<const Sample> rest = samples;
  for (const GenerationRequest& request : requests) {
    writer.write(line_of(model, request, rest.first(request.num_samples)));
    rest = rest.subspan(request.num_samples);
  }
  writer.close();
  if (arguments.statistics) std::cerr << line_of(engine.statistics()).dump() << "\n";
}

}  // namespace

void add_generate(CLI::App& app) {
  auto* verb = app.add_subcommand("generate", "Answer prompts: JSONL in, JSONL out");
  auto a = std::make_shared<GenerateArguments>();
  verb->add_option("--model", a->model, "Hugging Face directory or GGUF file")->required();
  verb->add_option(
          "--input", a->input,
          "JSONL with input_ids, prompt or messages, and options of its own for a line; - = standard input")
      ->required();
  verb->add_option(
      "--output", a->output,
      "JSONL: output_ids, text, logprobs, finish_reason, and what was asked for; - = standard output");
  verb->add_option("--max-new-tokens", a->request.stop.max_new_tokens, "Longest response")
      ->check(CLI::Range(std::int64_t{1}, std::int64_t{1} << 30));
  verb->add_option("--min-new-tokens", a->request.stop.min_new_tokens,
                   "End tokens have probability 0 before so many")
      ->check(CLI::NonNegativeNumber);
  verb->add_option("--temperature", a->request.sampling.temperature, "0 = greedy")
      ->check(CLI::NonNegativeNumber);
  verb->add_option("--top-k", a->request.sampling.top_k, "Keep the k largest logits; 0 = off");
  verb->add_option("--top-p", a->request.sampling.top_p, "Nucleus; 1 = off")->check(CLI::Range(0.0, 1.0));
  verb->add_option("--min-p", a->min_p, "Keep probabilities of at least this times the largest")
      ->check(CLI::Range(0.0, 1.0));
  verb->add_option("--repetition-penalty", a->request.sampling.repetition_penalty, "1 = off")
      ->check(CLI::PositiveNumber);
  verb->add_option("--presence-penalty", a->request.sampling.presence_penalty, "0 = off");
  verb->add_option("--frequency-penalty", a->request.sampling.frequency_penalty, "0 = off");
  verb->add_option("--stop", a->request.stop.strings, "Text that ends a response; may be given often")
      ->take_all()
      ->allow_extra_args(false);
  verb->add_option("--n", a->request.num_samples, "Responses per prompt")->check(CLI::Range(1u, 100000u));
  verb->add_option("--seed", a->request.seed, "Seed of the draws");
  verb->add_option("--stop-token-id", a->stop_token_ids, "Token that ends a response; may be given often")
      ->take_all()
      ->allow_extra_args(false);
  verb->add_option("--choice", a->choices, "The response is one of these texts; may be given often")
      ->take_all()
      ->allow_extra_args(false);
  verb->add_option("--deadline-steps", a->request.deadline.steps, "Engine steps a prompt may take; 0 = any")
      ->check(CLI::NonNegativeNumber);
  verb->add_option("--deadline-s", a->request.deadline.seconds, "Seconds a prompt may take; 0 = any")
      ->check(CLI::NonNegativeNumber);
  verb->add_flag("--raw-logprobs", a->request.output.raw_logprobs,
                 "Also the model's own log-probs, before filters and constraints");
  verb->add_flag("--entropies", a->request.output.entropies, "Also the entropy of each draw");
  verb->add_option("--top-logprobs", a->request.output.top_logprobs,
                   "Also the most probable tokens of each position as [id, log-prob]")
      ->check(CLI::Range(0, 1 << 20));
  verb->add_flag("--ignore-eos", a->ignore_eos, "Go on after end tokens");
  verb->add_option("--max-sequences", a->max_sequences, "Samples that decode at once")
      ->check(CLI::Range(1, 4096));
  verb->add_option("--max-tokens-per-step", a->max_tokens_per_step,
                   "Decode tokens and prefill of one step; 0 = 512, on a GPU 4096")
      ->check(CLI::Range(0, 1 << 20));
  verb->add_option(
          "--draft-rows", a->draft_rows,
          "Where so few samples decode, guess coming tokens up to so many rows a step; responses are the "
          "same; 0 = off")
      ->check(CLI::Range(0, 4096));
  add_weights_option(*verb, a->weights);
  add_kv_dtype_option(*verb, a->kv);
  verb->add_flag("--statistics", a->statistics, "One JSON object about speed on standard error");
  verb->add_option("--cache-blocks", a->cache_blocks,
                   "K/V blocks of 16 tokens; 0 = enough for all that decode at once")
      ->check(CLI::Range(0, 1 << 30));
  verb->add_option(
      "--environment", a->environment,
      "YAML file with tools or a user that answer the responses' turns (docs/design/environments.md); "
      "lines may have user_turns");
  verb->add_option("--threads", a->threads, "0 = one per core")->check(CLI::Range(0, 1024));
  add_device_option(*verb, a->device);
  verb->callback([a] { generate(*a); });
}

}  // namespace rlhf::cli

#include <algorithm>
#include <map>

#include "rlhf/cli/jsonl_input.h"
#include "rlhf/cli/model_arguments.h"
#include "rlhf/cli/verbs.h"
#include "rlhf/core/error.h"
#include "rlhf/train/generation.h"

namespace rlhf::cli {
namespace {

struct Arguments {
  std::string model, input, output = "-";
  std::int64_t max_new_tokens = 64, min_new_tokens = 0, max_sequences = 32;
  std::uint32_t n = 1;
  std::uint64_t seed = 0;
  int threads = 0;
  double min_p = -1;
  bool ignore_eos = false;
  SamplingOptions sampling;
  std::vector<std::string> stop;
};

void generate(const Arguments& arguments) {
  LoadedModel loaded(arguments.model, arguments.threads);
  const LanguageModel& model = loaded.model;
  std::vector<GenerationRequest> requests;
  std::int64_t longest = 1;
  for_each_json_line(arguments.input, [&](std::int64_t number, const nlohmann::json& line) {
    GenerationRequest request;
    const std::string where = concat(arguments.input, ":", number);
    request.prompt = tokens_of_line(model, line, where, Turn::kOpen);
    if (request.prompt.empty()) fail<IoError>(where, ": the prompt is empty");
    if (static_cast<std::int64_t>(request.prompt.size()) >= model.config().max_positions)
      fail<IoError>(where, ": the prompt has ", request.prompt.size(),
                    " tokens, which leaves no room in the model's context of ", model.config().max_positions);
    for (TokenId token : request.prompt)
      if (token < 0 || token >= model.config().vocab_size)
        fail<IoError>(where, ": token id ", token, " is outside the vocabulary of ",
                      model.config().vocab_size);
    request.prompt_id = requests.size();
    request.num_samples = arguments.n;
    request.seed = arguments.seed;
    request.sampling = arguments.sampling;
    if (arguments.min_p >= 0) request.sampling.min_p = arguments.min_p;
    if (!arguments.ignore_eos) request.stop.tokens = model.end_tokens();
    request.stop.strings = arguments.stop;
    request.stop.max_new_tokens = arguments.max_new_tokens;
    request.stop.min_new_tokens = arguments.min_new_tokens;
    longest = std::max(longest, static_cast<std::int64_t>(request.prompt.size()));
    requests.push_back(std::move(request));
  });
  RolloutEngineOptions options;
  options.max_sequences = std::min<std::int64_t>(arguments.max_sequences,
                                                 static_cast<std::int64_t>(requests.size()) * arguments.n);
  options.num_blocks = RolloutEngine::blocks_for(
      options.max_sequences + 1, std::min(model.config().max_positions, longest + arguments.max_new_tokens));
  std::function<std::string(TokenId)> bytes;
  if (model.has_tokenizer()) bytes = [&](TokenId id) { return model.tokenizer().token_bytes(id); };
  RolloutEngine engine(model.config(), loaded.compute, options, bytes);
  const std::size_t count = requests.size();
  const auto samples = generate_all(engine, model.parameters().weights(), 0, std::move(requests));
  LineWriter writer(arguments.output);
  std::size_t next = 0;
  for (std::size_t i = 0; i < count; ++i) {
    nlohmann::json line = {{"output_ids", nlohmann::json::array()},
                           {"text", nlohmann::json::array()},
                           {"logprobs", nlohmann::json::array()},
                           {"finish_reason", nlohmann::json::array()}};
    for (std::uint32_t k = 0; k < arguments.n; ++k, ++next) {
      const Sample& sample = samples[next];
      line["output_ids"].push_back(sample.tokens);
      line["text"].push_back(model.has_tokenizer() ? response_text(model, sample) : "");
      line["logprobs"].push_back(sample.logprobs);
      line["finish_reason"].push_back(to_string(sample.finish_reason));
    }
    writer.write(line);
  }
  writer.close();
}

}  // namespace

void add_generate(CLI::App& app) {
  auto* verb = app.add_subcommand("generate", "Answer prompts: JSONL in, JSONL out");
  auto a = std::make_shared<Arguments>();
  verb->add_option("--model", a->model, "Hugging Face directory or GGUF file")->required();
  verb->add_option("--input", a->input, "JSONL with input_ids, prompt or messages; - = standard input")
      ->required();
  verb->add_option("--output", a->output,
                   "JSONL: output_ids, text, logprobs, finish_reason; - = standard output");
  verb->add_option("--max-new-tokens", a->max_new_tokens, "Longest response")
      ->check(CLI::Range(std::int64_t{1}, std::int64_t{1} << 30));
  verb->add_option("--min-new-tokens", a->min_new_tokens, "End tokens have probability 0 before so many")
      ->check(CLI::NonNegativeNumber);
  verb->add_option("--temperature", a->sampling.temperature, "0 = greedy")->check(CLI::NonNegativeNumber);
  verb->add_option("--top-k", a->sampling.top_k, "Keep the k largest logits; 0 = off");
  verb->add_option("--top-p", a->sampling.top_p, "Nucleus; 1 = off")->check(CLI::Range(0.0, 1.0));
  verb->add_option("--min-p", a->min_p, "Keep probabilities of at least this times the largest")
      ->check(CLI::Range(0.0, 1.0));
  verb->add_option("--repetition-penalty", a->sampling.repetition_penalty, "1 = off")
      ->check(CLI::PositiveNumber);
  verb->add_option("--presence-penalty", a->sampling.presence_penalty, "0 = off");
  verb->add_option("--frequency-penalty", a->sampling.frequency_penalty, "0 = off");
  verb->add_option("--stop", a->stop, "Text that ends a response; may be given often")
      ->take_all()
      ->allow_extra_args(false);
  verb->add_option("--n", a->n, "Responses per prompt")->check(CLI::Range(1u, 100000u));
  verb->add_option("--seed", a->seed, "Seed of the draws");
  verb->add_flag("--ignore-eos", a->ignore_eos, "Go on after end tokens");
  verb->add_option("--max-sequences", a->max_sequences, "Samples that decode at once")
      ->check(CLI::Range(1, 4096));
  verb->add_option("--threads", a->threads, "0 = one per core")->check(CLI::Range(0, 1024));
  verb->callback([a] { generate(*a); });
}

}  // namespace rlhf::cli

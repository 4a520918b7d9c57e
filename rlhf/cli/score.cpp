#include <algorithm>

#include "rlhf/cli/jsonl_input.h"
#include "rlhf/cli/model_arguments.h"
#include "rlhf/cli/verbs.h"
#include "rlhf/core/error.h"
#include "rlhf/model/sequence_pass.h"

namespace rlhf::cli {
namespace {

using Pass = SequencePass<float>;

struct ScoreArguments {
  std::string model, input, output = "-";
  double temperature = 1;
  bool entropy = false;
  int threads = 0;
  Device device = Device::kAuto;
  std::int64_t max_tokens_per_pass = 1024;
};

// Lines for the sequences of one pass, in their order.
std::vector<nlohmann::json> score_pass(Pass& pass, const LoadedModel& loaded,
                                       const std::vector<std::span<const TokenId>>& sequences,
                                       const ScoreArguments& arguments) {
  const auto& weights = loaded.model.parameters().weights();
  const PackedRows rows(sequences);
  pass.forward(weights, rows, Pass::Keep::kNothing);
  std::vector<nlohmann::json> lines;
  if (loaded.model.config().scalar_head) {
    std::vector<std::int64_t> last;
    for (std::size_t s = 0; s < sequences.size(); ++s) last.push_back(rows.last_row(s));
    std::vector<float> scores(last.size());
    pass.scalar_outputs(weights, last, scores);
    for (float score : scores) lines.push_back({{"score", score}});
    return lines;
  }
  std::vector<TokenTarget> targets;
  for (std::size_t s = 0; s < sequences.size(); ++s)
    for (std::size_t t = 1; t < sequences[s].size(); ++t)
      targets.push_back({rows.row(s, static_cast<std::int64_t>(t) - 1), sequences[s][t]});
  std::vector<float> logprobs(targets.size()), entropies(arguments.entropy ? targets.size() : 0);
  pass.token_logprobs(weights, targets, arguments.temperature, logprobs, entropies);
  std::size_t next = 0;
  for (const auto& sequence : sequences) {
    nlohmann::json lps = nlohmann::json::array({nullptr}), ents = nlohmann::json::array({nullptr});
    for (std::size_t t = 1; t < sequence.size(); ++t, ++next) {
      lps.push_back(logprobs[next]);
      if (arguments.entropy) ents.push_back(entropies[next]);
    }
    nlohmann::json line = {{"logprobs", std::move(lps)}};
    if (arguments.entropy) line["entropy"] = std::move(ents);
    lines.push_back(std::move(line));
  }
  return lines;
}

void score(const ScoreArguments& arguments) {
  LoadedModel loaded(arguments.model, arguments.threads, arguments.device);
  std::vector<std::vector<TokenId>> sequences;
  for_each_json_line(arguments.input, [&](std::int64_t number, const nlohmann::json& line) {
    const std::string where = concat(arguments.input, ":", number);
    sequences.push_back(tokens_of_line(loaded.model, line, where, Turn::kClosed));
    const auto length = static_cast<std::int64_t>(sequences.back().size());
    if (length == 0) fail<IoError>(where, ": there are no tokens");
    if (length > loaded.model.config().max_positions)
      fail<IoError>(where, ": has ", length, " tokens, the model's context is ",
                    loaded.model.config().max_positions);
    for (TokenId token : sequences.back())
      if (token < 0 || token >= loaded.model.config().vocab_size)
        fail<IoError>(where, ": token id ", token, " is outside the vocabulary of ",
                      loaded.model.config().vocab_size);
  });
  Pass pass(loaded.model.config(), loaded.compute);
  const std::vector<std::span<const TokenId>> views(sequences.begin(), sequences.end());
  std::vector<nlohmann::json> lines(views.size());
  for (const auto& batch : split_into_passes(views, arguments.max_tokens_per_pass)) {
    std::vector<std::span<const TokenId>> part;
    for (std::size_t i : batch) part.push_back(views[i]);
    auto scored = score_pass(pass, loaded, part, arguments);
    for (std::size_t i = 0; i < batch.size(); ++i) lines[batch[i]] = std::move(scored[i]);
  }
  LineWriter writer(arguments.output);
  for (const nlohmann::json& line : lines) writer.write(line);
  writer.close();
}

}  // namespace

void add_score(CLI::App& app) {
  auto* verb =
      app.add_subcommand("score", "Log-probs (and entropy) of each token, or scores of a reward model");
  auto a = std::make_shared<ScoreArguments>();
  verb->add_option("--model", a->model, "Hugging Face directory or GGUF file")->required();
  verb->add_option("--input", a->input, "JSONL with input_ids, text, prompt or messages; - = standard input")
      ->required();
  verb->add_option("--output", a->output,
                   "JSONL: {\"logprobs\": [null, ...]} or {\"score\": x}; - = standard output");
  verb->add_option("--temperature", a->temperature, "Divisor of the logits")->check(CLI::PositiveNumber);
  verb->add_flag("--entropy", a->entropy, "Also the entropy of the distribution each token was taken from");
  verb->add_option("--max-tokens-per-pass", a->max_tokens_per_pass, "Tokens of one forward pass")
      ->check(CLI::Range(1, 1 << 24));
  verb->add_option("--threads", a->threads, "0 = one per core")->check(CLI::Range(0, 1024));
  add_device_option(*verb, a->device);
  verb->callback([a] { score(*a); });
}

}  // namespace rlhf::cli

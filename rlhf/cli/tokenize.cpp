#include "rlhf/cli/jsonl_input.h"
#include "rlhf/cli/model_arguments.h"
#include "rlhf/cli/verbs.h"
#include "rlhf/core/error.h"

namespace rlhf::cli {
namespace {

struct TokenizeArguments {
  std::string model, input, output = "-";
  bool closed = false;
};

void tokenize(const TokenizeArguments& arguments) {
  const LoadedModel loaded(arguments.model, 1);
  const LanguageModel& model = loaded.model;
  const Turn turn = arguments.closed ? Turn::kClosed : Turn::kOpen;
  LineWriter writer(arguments.output);
  for_each_json_line(arguments.input, [&](std::int64_t number, const nlohmann::json& line) {
    const std::string where = concat(arguments.input, ":", number);
    nlohmann::json out;
    const std::vector<TokenId> tokens = tokens_of_line(model, line, where, turn);
    for (TokenId token : tokens)
      if (token < 0 || token >= model.tokenizer().vocab_size())
        fail<IoError>(where, ": token id ", token, " is outside the tokenizer's vocabulary of ",
                      model.tokenizer().vocab_size());
    out["input_ids"] = tokens;
    if (!line.contains("input_ids")) out["text"] = text_of_line(model, line, where, turn);
    out["decoded"] = model.tokenizer().decode(tokens);
    writer.write(out);
  });
  writer.close();
}

}  // namespace

void add_tokenize(CLI::App& app) {
  auto* verb = app.add_subcommand("tokenize", "Encode texts and chats: JSONL in, JSONL out");
  auto a = std::make_shared<TokenizeArguments>();
  verb->add_option("--model", a->model, "Hugging Face directory or GGUF file")->required();
  verb->add_option("--input", a->input, "JSONL with text, prompt, messages or input_ids; - = standard input")
      ->required();
  verb->add_option("--output", a->output,
                   "JSONL: input_ids, text (as rendered; not for input_ids), decoded; - = standard output");
  verb->add_flag("--closed", a->closed, "Render chats without opening the assistant's turn");
  verb->callback([a] { tokenize(*a); });
}

}  // namespace rlhf::cli

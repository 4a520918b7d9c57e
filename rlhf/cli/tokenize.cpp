#include "rlhf/cli/jsonl_input.h"
#include "rlhf/cli/verbs.h"
#include "rlhf/core/error.h"
#include "rlhf/model/tokenizer.h"

namespace rlhf::cli {
void add_tokenize(CLI::App& app) {
  app.add_subcommand("tokenize", "Encode texts and chats: JSONL in, JSONL out");
}
}  // namespace rlhf::cli

#include "rlhf/model/tokenize_stream.h"

#include <sstream>

#include "rlhf/core/error.h"
#include "tests/catch.h"
#include "tests/model/golden.h"

using namespace rlhf;
using model_test::golden;
using model_test::message_of;

namespace {

std::string run(const std::string& input, TokenizeSummary* summary = nullptr) {
  static const Tokenizer kTokenizer = Tokenizer::load(golden("tokenizer_smollm_style"));
  std::istringstream in(input);
  std::ostringstream out;
  const TokenizeSummary found = tokenize_jsonl(in, out, kTokenizer, ChatTemplate::chatml());
  if (summary) *summary = found;
  return out.str();
}

std::string error_of(const std::string& input) {
  return message_of<IoError>([&] { run(input); });
}

}  // namespace

TEST_CASE("texts and chats become ids, one line each") {
  TokenizeSummary summary;
  const std::string out =
      run("{\"text\":\"12 "
          "caf\\u00e9\"}\n\n{\"messages\":[{\"role\":\"user\",\"content\":\"Hi\"}],\"add_generation_prompt\":"
          "true}\n",
          &summary);
  std::istringstream lines(out);
  std::string first, second;
  std::getline(lines, first);
  std::getline(lines, second);
  const auto text = nlohmann::json::parse(first), chat = nlohmann::json::parse(second);
  REQUIRE(text["decoded"] == "12 café");
  REQUIRE(text["input_ids"].size() >= 3);
  REQUIRE(chat["text"] == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
  REQUIRE(chat["decoded"] == chat["text"]);
  REQUIRE(summary.lines == 2);
  REQUIRE(summary.tokens == static_cast<std::int64_t>(text["input_ids"].size() + chat["input_ids"].size()));
}

TEST_CASE("bad lines are named by their number") {
  REQUIRE_THAT(error_of("{\"text\":\"a\"}\nnot json\n"), ContainsSubstring("input:2: offset"));
  REQUIRE_THAT(error_of("[]\n"), ContainsSubstring("input:1: expected a JSON object"));
  REQUIRE_THAT(error_of("\n{\"texts\":\"a\"}\n"), ContainsSubstring("input:2: unknown key texts"));
  REQUIRE_THAT(error_of("{}\n"), ContainsSubstring("either text or messages"));
  REQUIRE_THAT(error_of("{\"text\":5}\n"), ContainsSubstring("text: expected a string"));
  REQUIRE_THAT(error_of("{\"messages\":\"x\"}\n"),
               ContainsSubstring("input:1: chat: expected a list of messages"));
  REQUIRE_THAT(error_of("{\"messages\":[{\"role\":\"user\"}]}\n"),
               ContainsSubstring("input:1: built-in ChatML template: line 1"));
  REQUIRE_THAT(error_of("{\"messages\":[],\"add_generation_prompt\":1}\n"),
               ContainsSubstring("expected true or false"));
}

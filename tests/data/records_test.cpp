#include "rlhf/data/records.h"

#include <nlohmann/json.hpp>

#include "rlhf/core/error.h"
#include "rlhf/data/jsonl.h"
#include "tests/catch.h"
#include "tests/data/temporary_folder.h"

namespace rlhf {
namespace {

TEST_CASE("JSONL: line numbers count blank lines; BOM, CRLF and a missing last newline are fine") {
  TemporaryFolder folder;
  JsonlReader reader(folder.write("a.jsonl", "\xef\xbb\xbf{\"a\":1}\r\n\n  \n{\"a\":2}"));
  nlohmann::json value;
  REQUIRE(reader.next(value));
  CHECK(value["a"] == 1);
  CHECK(reader.line() == 1);
  REQUIRE(reader.next(value));
  CHECK(value["a"] == 2);
  CHECK(reader.line() == 4);
  CHECK_FALSE(reader.next(value));
}

TEST_CASE("JSONL: errors name file and line") {
  TemporaryFolder folder;
  const auto read_all = [](const std::filesystem::path& path) {
    for_each_json_line(path, [](const nlohmann::json&, std::int64_t) {});
  };
  CHECK_THROWS_WITH(read_all(folder.write("bad.jsonl", "{\"a\":1}\n{\"a\":\n")),
                    ContainsSubstring("bad.jsonl:2: not valid JSON"));
  CHECK_THROWS_WITH(read_all(folder.write("utf.jsonl", "{\"a\":\"\xff\"}")),
                    ContainsSubstring("utf.jsonl:1: not valid"));
  CHECK_THROWS_WITH(read_all(folder.write("list.jsonl", "[1]")),
                    ContainsSubstring("list.jsonl:1: got array, expected an object"));
  CHECK_THROWS_WITH(read_all(folder.write("empty.jsonl", "\n")),
                    ContainsSubstring("empty.jsonl: holds no records"));
  CHECK_THROWS_WITH(read_all(folder.path() / "none.jsonl"), ContainsSubstring("none.jsonl: no such file"));
  CHECK_THROWS_WITH(read_all(folder.path()), ContainsSubstring("is a folder"));
  const std::string deep(2000000, '[');
  CHECK_THROWS_AS(read_all(folder.write("deep.jsonl", deep)), IoError);
}

TEST_CASE("SFT records: messages, prompt with response, raw text") {
  TemporaryFolder folder;
  const auto path = folder.write(
      "sft.jsonl",
      R"({"messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"yes"}],"task":"x"})"
      "\n"
      R"({"prompt":"hi","response":"yo"})"
      "\n"
      R"({"prompt":[{"role":"system","content":"s"},{"role":"user","content":"u"}],"completion":"c"})");
  const auto chat = read_sft_records(path, PromptText::kUserMessage);
  REQUIRE(chat.size() == 3);
  CHECK(chat[0].messages == Chat{{"user", "hi"}, {"assistant", "yes"}});
  CHECK(chat[0].task == "x");
  CHECK(chat[1].messages == Chat{{"user", "hi"}, {"assistant", "yo"}});
  CHECK(chat[2].messages == Chat{{"system", "s"}, {"user", "u"}, {"assistant", "c"}});
  CHECK(chat[2].line == 3);
  const auto raw = read_sft_records(path, PromptText::kRaw);
  CHECK(raw[1].messages.empty());
  CHECK(raw[1].prompt == "hi");
  CHECK(raw[1].response == "yo");

  const auto error = [&](const char* text, const char* part) {
    CHECK_THROWS_WITH(read_sft_records(folder.write("e.jsonl", text), PromptText::kRaw),
                      ContainsSubstring(part));
  };
  error("{}", "e.jsonl:1: expected \"messages\", or \"prompt\" and \"response\"");
  error(R"({"prompt":"a"})", "key \"response\" is missing");
  error(R"({"prompt":"a","response":3})", "key \"response\": got number, expected text");
  error(R"({"messages":[{"role":"user","content":"a"}]})", "no assistant message");
  error(R"({"messages":[{"role":"user"}]})", "message 1 has no text under \"content\"");
  error(R"({"messages":[]})", "the list is empty");
  error(R"({"messages":"a"})", "got string, expected a list");
}

TEST_CASE("preference pairs: strings, messages, implicit prompts, HH dialogues") {
  TemporaryFolder folder;
  const auto path = folder.write(
      "pairs.jsonl",
      R"({"prompt":"q","chosen":"a","rejected":"b","margin":0.5})"
      "\n"
      R"({"prompt":[{"role":"user","content":"q"}],"chosen":[{"role":"assistant","content":"a"}],"rejected":"b"})"
      "\n"
      R"({"chosen":[{"role":"user","content":"q"},{"role":"assistant","content":"a"}],)"
      R"("rejected":[{"role":"user","content":"q"},{"role":"assistant","content":"b"}]})"
      "\n"
      R"({"chosen":"\n\nHuman: q\n\nAssistant: x\n\nHuman: more?\n\nAssistant: a b","rejected":"\n\nHuman: q\n\nAssistant: c\n"})");
  const auto pairs = read_preference_pairs(path, PromptText::kUserMessage);
  REQUIRE(pairs.size() == 4);
  for (std::size_t i = 0; i < 3; ++i) {
    CHECK(pairs[i].chosen.prompt.messages == Chat{{"user", "q"}});
    CHECK(pairs[i].rejected.prompt.messages == Chat{{"user", "q"}});
    CHECK(pairs[i].chosen.response == "a");
    CHECK(pairs[i].rejected.response == "b");
  }
  CHECK(pairs[0].margin == 0.5);
  CHECK(pairs[1].margin == 0);
  CHECK(pairs[3].chosen.prompt.messages == Chat{{"user", "q"}, {"assistant", "x"}, {"user", "more?"}});
  CHECK(pairs[3].chosen.response == "a b");
  CHECK(pairs[3].rejected.response == "c");

  const auto error = [&](const char* text, const char* part) {
    CHECK_THROWS_WITH(read_preference_pairs(folder.write("e.jsonl", text), PromptText::kRaw),
                      ContainsSubstring(part));
  };
  error(R"({"prompt":"q","chosen":"a"})", "key \"rejected\" is missing");
  error(R"({"chosen":"a","rejected":"b"})", "does not start with");
  error(R"({"chosen":"\n\nHuman: q","rejected":"b"})", "must end with an assistant turn");
  error(R"({"prompt":"q","chosen":"a","rejected":"b","margin":"1"})",
        "key \"margin\": got \"1\", expected a number");
}

TEST_CASE("labelled responses: strings, messages, labels") {
  TemporaryFolder folder;
  const auto path = folder.write(
      "labels.jsonl",
      R"({"prompt":"q","completion":"a","label":true})"
      "\n"
      R"({"prompt":[{"role":"user","content":"q"}],"response":[{"role":"assistant","content":"b"}],"label":false})");
  const auto labels = read_labelled_responses(path, PromptText::kUserMessage);
  REQUIRE(labels.size() == 2);
  for (const LabelledResponse& label : labels) CHECK(label.answer.prompt.messages == Chat{{"user", "q"}});
  CHECK(labels[0].answer.response == "a");
  CHECK(labels[0].desirable);
  CHECK(labels[1].answer.response == "b");
  CHECK_FALSE(labels[1].desirable);
  CHECK(labels[1].line == 2);

  const auto error = [&](const char* text, const char* part) {
    CHECK_THROWS_WITH(read_labelled_responses(folder.write("e.jsonl", text), PromptText::kRaw),
                      ContainsSubstring(part));
  };
  error(R"({"completion":"a","label":true})", "e.jsonl:1: key \"prompt\" is missing");
  error(R"({"prompt":"q","label":true})", "key \"response\" is missing");
  error(R"({"prompt":"q","response":"a"})", "key \"label\" is missing");
  error(R"({"prompt":"q","response":"a","label":1})",
        "key \"label\": got 1, expected true (desirable) or false");
}

TEST_CASE("prompt records: prompts, messages, ids, references") {
  TemporaryFolder folder;
  const auto path = folder.write("prompts.jsonl",
                                 "{\"prompt\":\"q\",\"task\":\"t\",\"reference\":{\"value\":3}}\n"
                                 "{\"input_ids\":[1,2],\"id\":77,\"user_turns\":[\"a\",\"b\"]}\n"
                                 "{\"messages\":[{\"role\":\"user\",\"content\":\"u\"}]}\n");
  const auto prompts = read_prompt_records(path, PromptText::kRaw);
  REQUIRE(prompts.size() == 3);
  CHECK(prompts[0].content.text == "q");
  CHECK(prompts[0].task == "t");
  CHECK(prompts[0].reference == "{\"value\":3}");
  CHECK(prompts[1].content.input_ids == std::vector<TokenId>{1, 2});
  CHECK(prompts[1].id == 77);
  CHECK(prompts[1].user_turns == std::vector<std::string>{"a", "b"});
  CHECK(prompts[0].user_turns.empty());
  CHECK(prompts[2].id == 2);
  CHECK(prompts[2].content.messages == Chat{{"user", "u"}});
  const auto error = [&](const char* text, const char* part) {
    CHECK_THROWS_WITH(read_prompt_records(folder.write("e.jsonl", text), PromptText::kRaw),
                      ContainsSubstring(part));
  };
  error("{\"prompt\":\"a\",\"input_ids\":[1]}", "expected one of");
  error("{\"prompt\":\"\"}", "the text is empty");
  error("{\"prompt\":\"a\",\"user_turns\":\"b\"}", "got string, expected a list of texts");
  error("{\"prompt\":\"a\",\"user_turns\":[\"b\",1]}", "got number at position 1, expected text");
  error("{\"input_ids\":[1,-2]}", "got -2 at position 1");
  error("{\"prompt\":\"a\",\"id\":-1}", "key \"id\"");
}

}  // namespace
}  // namespace rlhf

#include "rlhf/data/records.h"
#include "tests/catch.h"

namespace rlhf {
namespace {

TEST_CASE("the files of examples/custom_data read as the README says") {
  const std::filesystem::path folder =
      std::filesystem::path(RLHF_SOURCE_DIR) / "examples" / "custom_data" / "data";
  const auto demonstrations = read_sft_records(folder / "demonstrations.jsonl", PromptText::kUserMessage);
  const auto pairs = read_preference_pairs(folder / "pairs.jsonl", PromptText::kUserMessage);
  const auto prompts = read_prompt_records(folder / "prompts.jsonl", PromptText::kUserMessage);
  CHECK(demonstrations.size() == 8);
  for (const SftRecord& record : demonstrations) CHECK(record.messages.size() == 2);
  CHECK(pairs.size() == 8);
  for (const PreferencePair& pair : pairs) CHECK(pair.chosen.response != pair.rejected.response);
  CHECK(prompts.size() == 8);
  for (const PromptRecord& prompt : prompts) CHECK_FALSE(prompt.reference.empty());
}

TEST_CASE("the files of examples/tools read as configs/runs/tools_tiny.yaml needs them") {
  const std::filesystem::path folder = std::filesystem::path(RLHF_SOURCE_DIR) / "examples" / "tools" / "data";
  for (const SftRecord& record :
       read_sft_records(folder / "demonstrations.jsonl", PromptText::kUserMessage)) {
    REQUIRE(record.messages.size() == 4);
    CHECK(record.messages[2].role == "tool");
    CHECK(record.messages[2].content == record.messages[3].content);
  }
  for (const char* name : {"prompts.jsonl", "held_out.jsonl"})
    for (const PromptRecord& prompt : read_prompt_records(folder / name, PromptText::kUserMessage))
      CHECK_FALSE(prompt.reference.empty());
}

}  // namespace
}  // namespace rlhf

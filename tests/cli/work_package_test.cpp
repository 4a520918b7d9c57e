#include "rlhf/cli/work_package.h"

#include "rlhf/core/error.h"
#include "tests/catch.h"
#include "tests/data/temporary_folder.h"

namespace rlhf::cli {
namespace {

using Mode = WorkPackage::Mode;

struct PackageFolder : TemporaryFolder {
  PackageFolder() {
    write("work.json", R"({"variant": "hand", "pad_token_id": 0, "eos_token_id": 1})");
    write("prompts.jsonl", "{\"id\": 7, \"text\": \"x\", \"input_ids\": [3, 4]}\n{\"input_ids\": [5]}\n");
    write("lengths.json", R"({"fraction": [0.25, 0.01, 1.0, 0.45]})");
  }
};

ModelConfig policy() {
  ModelConfig config;
  config.vocab_size = 10;
  config.hidden_size = 8;
  config.max_positions = 16;
  return config;
}

TEST_CASE("a work package fixes prompts and lengths by slot") {
  const PackageFolder folder;
  const WorkPackage work = load_work_package(folder.path());
  CHECK(work.variant == "hand");
  CHECK(work.eos == 1);
  CHECK(work.prompt(0).tokens == std::vector<TokenId>{3, 4});
  CHECK(work.prompt(5).tokens == std::vector<TokenId>{5});
  CHECK(work.response_tokens(0, Mode::kNatural, 10) == 2);  // 2.5, halves to even
  CHECK(work.response_tokens(1, Mode::kNatural, 10) == 2);  // 0.1, but no fewer than 2
  CHECK(work.response_tokens(6, Mode::kNatural, 10) == 10);
  CHECK(work.response_tokens(3, Mode::kNatural, 20) == 9);
  CHECK(work.response_tokens(1, Mode::kFixed, 10) == 10);
  check_fits(work, policy(), 14);
  CHECK_THROWS_WITH(check_fits(work, policy(), 15),
                    ContainsSubstring("prompts.jsonl: the prompt with id 7 has 2 tokens; with "
                                      "--response-tokens 15 that exceeds the policy's context of 16"));
}

TEST_CASE("a damaged work package is refused with file and expectation") {
  PackageFolder folder;
  const auto load = [&] { return load_work_package(folder.path()); };
  CHECK_THROWS_WITH(load_work_package(folder.path() / "none"),
                    ContainsSubstring("none: no such directory; expected a work package"));
  folder.write("lengths.json", R"({"fraction": [0.5, 1.5]})");
  CHECK_THROWS_WITH(load(), ContainsSubstring("lengths.json: key \"fraction\", entry 1: got 1.5, expected"));
  folder.write("lengths.json", R"({"mean": 1})");
  CHECK_THROWS_WITH(load(), ContainsSubstring("lengths.json: key \"fraction\": expected a list"));
  folder.write("prompts.jsonl", "{\"prompt\": \"text\"}\n");
  CHECK_THROWS_WITH(load(), ContainsSubstring("prompts.jsonl:1: expected \"input_ids\""));
  folder.write("work.json", R"({"pad_token_id": 0})");
  CHECK_THROWS_WITH(load(), ContainsSubstring("work.json") && ContainsSubstring("eos_token_id"));
}

TEST_CASE("token ids and models of a work package fit its policy") {
  PackageFolder folder;
  ModelConfig small = policy(), reward = policy();
  small.vocab_size = 4;
  const WorkPackage work = load_work_package(folder.path());
  CHECK_THROWS_WITH(
      check_fits(work, small, 2),
      ContainsSubstring("id 7 has token id 4, expected ids below the policy's vocabulary of 4"));
  CHECK_THROWS_WITH(
      check_scalar_model(work, "reward", reward, policy()),
      ContainsSubstring("config.json: expected a sequence classification model with one label"));
  reward.scalar_head = true;
  reward.num_labels = 1;
  check_scalar_model(work, "reward", reward, policy());
  reward.hidden_size = 12;
  CHECK_THROWS_WITH(check_scalar_model(work, "reward", reward, policy()),
                    ContainsSubstring("config.json: hidden_size is 12, expected 8 as in policy/config.json"));
}

}  // namespace
}  // namespace rlhf::cli

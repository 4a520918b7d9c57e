#include "rlhf/config/description.h"

#include <algorithm>

#include "rlhf/core/error.h"
#include "tests/catch.h"
#include "tests/config/example_options.h"

namespace rlhf::config {
namespace {

TEST_CASE("list_fields names every key once, in order") {
  const auto fields = list_fields<RunOptions>();
  REQUIRE(fields.size() == 14 + 5 + 1 + 2);
  CHECK(fields[0].path == "path");
  CHECK(fields[0].required);
  CHECK(fields[0].default_value.empty());
  const auto clip =
      std::find_if(fields.begin(), fields.end(), [](auto& f) { return f.path == "ppo.clip_range"; });
  REQUIRE(clip != fields.end());
  CHECK(clip->type == "number");
  CHECK(clip->default_value == "0.2");
  CHECK(clip->bounds.max == 1.0);
  CHECK(clip->help == "Ratio clip epsilon");
  CHECK(fields.back().path == "rewards[].weight");
}

TEST_CASE("explain describes keys, groups and list items") {
  CHECK(explain<RunOptions>("ppo.clip_range") ==
        "ppo.clip_range\n  Ratio clip epsilon\n  type: number in [0, 1]\n  default: 0.2\n");
  CHECK_THAT(explain<RunOptions>("mode"), ContainsSubstring("choices: serial streamed"));
  CHECK_THAT(explain<RunOptions>("lora"), ContainsSubstring("key: lora.rank"));
  CHECK_THAT(explain<RunOptions>("rewards.0.weight"), ContainsSubstring("rewards[].weight"));
  CHECK_THROWS_WITH(explain<RunOptions>("ppo.clip_rng"), ContainsSubstring("nearest key is ppo.clip_range"));
}

TEST_CASE("diff lists exactly the keys that differ") {
  RunOptions left, right;
  CHECK(diff(left, right).empty());
  right.ppo.clip_range = 0.3;
  right.lora = LoraOptions{};
  right.rewards = {{"x", 1}};
  const auto differences = diff(left, right);
  REQUIRE(differences.size() == 5);
  CHECK(differences[0].path == "ppo.clip_range");
  CHECK(differences[0].left == "0.2");
  CHECK(differences[0].right == "0.3");
  CHECK(differences[1].path == "lora");
  CHECK(differences[1].right.empty());
  CHECK(differences[2].path == "lora.rank");
  CHECK(differences[3].path == "rewards.0.rule");
}

}  // namespace
}  // namespace rlhf::config

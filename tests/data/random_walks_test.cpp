#include "rlhf/data/random_walks.h"

#include <map>

#include "rlhf/core/error.h"
#include "tests/catch.h"

namespace rlhf::random_walks {
namespace {

// Expected reward of a uniform legal walk that has `length` nodes so far and stands at `node`.
double uniform_walk_reward(char start, char node, std::size_t length) {
  if (node == kGoal) {
    return static_cast<double>(kMaxNodes - length) / static_cast<double>(kMaxNodes - shortest_length(start));
  }
  if (length == kMaxNodes) return 0;
  double sum = 0;
  for (const char next : neighbours(node)) sum += uniform_walk_reward(start, next, length + 1);
  return sum / static_cast<double>(neighbours(node).size());
}

TEST_CASE("shortest lengths are those of the published graph") {
  const std::map<char, std::size_t> expected = {
      {'b', 3}, {'c', 4}, {'d', 2}, {'e', 4}, {'f', 3}, {'g', 5}, {'h', 5}, {'i', 3}, {'j', 3}, {'k', 3},
      {'l', 4}, {'m', 4}, {'n', 2}, {'o', 5}, {'p', 4}, {'q', 4}, {'r', 4}, {'s', 3}, {'t', 4}, {'u', 4}};
  for (const auto& [node, length] : expected) {
    INFO(node);
    CHECK(shortest_length(node) == length);
  }
  CHECK(start_nodes().size() == expected.size());
}

TEST_CASE("a uniform legal walk scores 0.346") {
  double sum = 0;
  for (const char start : start_nodes()) sum += uniform_walk_reward(start, start, 1);
  CHECK(sum / 20 == Approx(0.346).margin(0.0005));
}

TEST_CASE("rewards by hand") {
  CHECK(reward('d', "a") == 1.0);
  CHECK(reward('d', "azz") == 1.0);
  CHECK(reward('d', "lba") == 0.0);  // b has no edge to a
  CHECK(reward('b', "da") == 1.0);
  CHECK(reward('b', "jna") == Approx(6.0 / 7.0));
  CHECK(reward('b', "") == 0.0);
  CHECK(reward('b', "d") == 0.0);
  CHECK(reward('d', "tkbdtkbda") == 0.0);  // the goal as tenth node
  CHECK(reward('d', "tkbda") == Approx(4.0 / 8.0));
  CHECK(reward('d', "A") == 0.0);
  CHECK_THROWS_AS(reward('a', ""), InvalidArgument);
  CHECK_THROWS_WITH(reward('z', ""), ContainsSubstring("no node 'z'"));
}

TEST_CASE("walks are legal, seeded and of the right lengths") {
  const auto walks = make_walks(1000, 3);
  CHECK(walks == make_walks(1000, 3));
  CHECK(walks != make_walks(1000, 4));
  for (const std::string& walk : walks) {
    REQUIRE(walk.size() >= 2);
    REQUIRE(walk.size() <= kMaxNodes);
    CHECK(walk[0] != kGoal);
    for (std::size_t i = 1; i < walk.size(); ++i)
      CHECK(neighbours(walk[i - 1]).find(walk[i]) != std::string_view::npos);
    CHECK(walk.substr(0, walk.size() - 1).find(kGoal) == std::string::npos);
    if (walk.size() < kMaxNodes) CHECK(walk.back() == kGoal);
  }
}

}  // namespace
}  // namespace rlhf::random_walks

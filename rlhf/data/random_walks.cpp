#include "rlhf/data/random_walks.h"

#include <array>

#include "rlhf/core/error.h"
#include "rlhf/core/random.h"

namespace rlhf::random_walks {
namespace {

constexpr std::array<std::string_view, kNumNodes> kEdges = {
    "",  "dju",    "ekor", "alt", "bs", "dhim", "cqru", "c",  "dh", "n",  "bgjn",
    "b", "befghs", "ab",   "r",   "ju", "fj",   "gjo",  "du", "k",  "bis"};

bool is_node(char c) {
  return c >= 'a' && c < static_cast<char>('a' + kNumNodes);
}

// Breadth first from every node at once: lengths shrink until nothing changes.
std::array<std::size_t, kNumNodes> compute_lengths() {
  std::array<std::size_t, kNumNodes> lengths;
  lengths.fill(kNumNodes + 1);
  lengths[0] = 1;
  for (std::size_t round = 0; round < kNumNodes; ++round) {
    for (std::size_t node = 1; node < kNumNodes; ++node) {
      for (const char next : kEdges[node]) {
        lengths[node] = std::min(lengths[node], lengths[static_cast<std::size_t>(next - 'a')] + 1);
      }
    }
  }
  return lengths;
}

std::size_t nodes_until_goal(char start, std::string_view continuation) {
  char node = start;
  std::size_t length = 1;
  for (const char next : continuation) {
    if (length == kMaxNodes || neighbours(node).find(next) == std::string_view::npos) return kMaxNodes;
    ++length;
    if (next == kGoal) return length;
    node = next;
  }
  return kMaxNodes;
}

}  // namespace

std::string_view neighbours(char node) {
  RLHF_CHECK(is_node(node), "random walks: no node '", node, "', expected a letter a .. u");
  return kEdges[static_cast<std::size_t>(node - 'a')];
}

std::size_t shortest_length(char start) {
  static const auto lengths = compute_lengths();
  RLHF_CHECK(is_node(start), "random walks: no node '", start, "', expected a letter a .. u");
  return lengths[static_cast<std::size_t>(start - 'a')];
}

std::string_view start_nodes() {
  return "bcdefghijklmnopqrstu";
}

std::vector<std::string> make_walks(std::size_t count, std::uint64_t seed) {
  constexpr std::uint64_t kStream = 0x77616c6b73;  // "walks"
  RandomStream random(seed, kStream);
  std::vector<std::string> walks;
  for (std::size_t i = 0; i < count; ++i) {
    std::string walk(1, start_nodes()[random.below(start_nodes().size())]);
    while (walk.size() < kMaxNodes && walk.back() != kGoal) {
      const std::string_view next = neighbours(walk.back());
      walk += next[random.below(next.size())];
    }
    walks.push_back(std::move(walk));
  }
  return walks;
}

double reward(char start, std::string_view continuation) {
  RLHF_CHECK(start != kGoal, "random walks: a walk cannot start at the goal");
  const std::size_t shortest = shortest_length(start);
  return static_cast<double>(kMaxNodes - nodes_until_goal(start, continuation)) /
         static_cast<double>(kMaxNodes - shortest);
}

}  // namespace rlhf::random_walks

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

/// The random walks task of trlX: find the shortest way to node `a` of a fixed graph of 21 nodes, one letter
/// a node. It trains in seconds, and its optimum (reward 1) is known.
namespace rlhf::random_walks {

inline constexpr std::size_t kNumNodes = 21;  ///< letters a .. u
inline constexpr std::size_t kMaxNodes = 10;  ///< of a walk, its start included
inline constexpr char kGoal = 'a';

/// Returns the nodes that `node` has edges to, as letters; empty for the goal, which is absorbing.
/// @throws InvalidArgument for a letter that is no node.
std::string_view neighbours(char node);

/// Number of nodes on a shortest path from `start` to the goal, both included (1 for the goal itself).
std::size_t shortest_length(char start);

/// Returns the 20 start letters b .. u.
std::string_view start_nodes();

/// Returns `count` uniform random walks from uniform non-goal starts; each stops at the goal or after
/// kMaxNodes nodes.
std::vector<std::string> make_walks(std::size_t count, std::uint64_t seed);

/// Reward of `start` followed by `continuation`, in [0, 1]: (10 - L) / (10 - shortest), where L is the number
/// of nodes until the goal, or 10 when an illegal letter or edge comes first or the goal is not reached
/// within 10 nodes. Letters behind the goal are not looked at.
double reward(char start, std::string_view continuation);

}  // namespace rlhf::random_walks

#include "rlhf/model/packed_rows.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <utility>

#include "rlhf/kernels/kernel_table.h"

namespace rlhf {
namespace {

constexpr std::size_t kB = kernels::kBlockTokens;

// Gives equal rows to equal tokens behind equal rows. New rows are numbered in the order in which they come.
class PrefixTree {
 public:
  std::vector<std::int64_t> add(std::span<const TokenId> sequence) {
    std::vector<std::int64_t> rows;
    rows.reserve(sequence.size());
    std::int64_t parent = -1;
    for (const TokenId token : sequence) {
      const auto [place, inserted] = children_.try_emplace({parent, token}, num_rows_);
      num_rows_ += inserted;
      rows.push_back(parent = place->second);
    }
    return rows;
  }
  std::int64_t num_rows() const { return num_rows_; }

 private:
  std::map<std::pair<std::int64_t, TokenId>, std::int64_t> children_;
  std::int64_t num_rows_ = 0;
};

}  // namespace

PackedRows::PackedRows(const std::vector<std::span<const TokenId>>& sequences) : tables_(sequences.size()) {
  PrefixTree tree;
  std::vector<std::int32_t> block_of_row;                          // where a row's K and V are written first
  std::vector<std::pair<std::int64_t, std::int32_t>> more_blocks;  // (row, block) where they are needed too
  std::map<std::int32_t, std::size_t> tree_of_block;
  for (std::size_t s = 0; s < sequences.size(); ++s) {
    const auto first_new = static_cast<std::size_t>(tree.num_rows());
    sequence_rows_.push_back(tree.add(sequences[s]));
    const auto& rows = sequence_rows_.back();
    const auto shared = static_cast<std::size_t>(
        std::ranges::lower_bound(rows, static_cast<std::int64_t>(first_new)) - rows.begin());
    if (shared == rows.size()) continue;  // the head of another sequence, or empty
    // Whole blocks of the common head are shared. The block in which the sequence branches off is its own,
    // with a copy of the head's tokens in it.
    std::vector<std::int32_t>& table = tables_[s];
    for (std::size_t begin = 0; begin < rows.size(); begin += kB) {
      if (begin + kB <= shared) {
        table.push_back(block_of_row[static_cast<std::size_t>(rows[begin + kB - 1])]);
        continue;
      }
      for (std::size_t p = begin; p < std::min(shared, begin + kB); ++p)
        more_blocks.emplace_back(rows[p], num_blocks_);
      table.push_back(num_blocks_++);
    }
    const auto [group, inserted] = tree_of_block.try_emplace(table.front(), trees_.size());
    if (inserted) trees_.emplace_back();
    for (std::size_t p = shared; p < rows.size(); ++p) {
      trees_[group->second].push_back(rows[p]);
      block_of_row.push_back(table[p / kB]);
      rows_.tokens.push_back(sequences[s][p]);
      rows_.positions.push_back(static_cast<std::int32_t>(p));
      rows_.tables.push_back(table.data());
    }
  }
  std::ranges::stable_sort(more_blocks, {}, &std::pair<std::int64_t, std::int32_t>::first);
  for (std::size_t t = 0, next = 0; t <= rows_.tokens.size(); ++t) {
    rows_.copy_offsets.push_back(next);
    for (; next < more_blocks.size() && more_blocks[next].first == static_cast<std::int64_t>(t); ++next)
      rows_.copies.push_back(more_blocks[next].second);
  }
}

std::vector<std::vector<std::size_t>> split_into_passes(
    const std::vector<std::span<const TokenId>>& sequences, std::int64_t max_rows,
    std::size_t sequences_per_item) {
  std::vector<std::size_t> order(sequences.size() / sequences_per_item);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::ranges::stable_sort(order, [&](std::size_t a, std::size_t b) {
    return std::ranges::lexicographical_compare(sequences[a * sequences_per_item],
                                                sequences[b * sequences_per_item]);
  });
  const auto add = [&](PrefixTree& tree, std::size_t item) {
    for (std::size_t s = 0; s < sequences_per_item; ++s) tree.add(sequences[item * sequences_per_item + s]);
    return tree.num_rows();
  };
  std::vector<std::vector<std::size_t>> passes;
  PrefixTree tree;
  for (const std::size_t item : order) {
    if (passes.empty() || add(tree, item) > max_rows) {
      passes.emplace_back();
      tree = {};
      add(tree, item);
    }
    passes.back().push_back(item);
  }
  return passes;
}

}  // namespace rlhf

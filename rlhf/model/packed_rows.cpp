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
  // Only sequences of one root, which is negative, have rows in common.
  std::vector<std::int64_t> add(std::span<const TokenId> sequence, std::int64_t root = -1) {
    std::vector<std::int64_t> rows;
    rows.reserve(sequence.size());
    std::int64_t parent = root;
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

kernels::PassRows Rows::view() const {
  const std::int64_t last = positions.empty() ? -1 : *std::ranges::max_element(positions);
  return {size(),
          tokens.data(),
          positions.data(),
          tables.data(),
          copy_offsets.empty() ? nullptr : copy_offsets.data(),
          copies.data(),
          last + 1};
}

kernels::RowTrees PackedRows::row_trees() const {
  return {static_cast<std::int64_t>(trees_.size()), tree_offsets_.data(), tree_rows_.data()};
}

kernels::BlockUses PackedRows::block_uses() const {
  return {num_blocks_, use_offsets_.data(), use_ranges_.data(), first_keys_.data()};
}

PackedRows::PackedRows(const std::vector<std::span<const TokenId>>& sequences, Heads heads)
    : tables_(sequences.size()) {
  PrefixTree tree;
  std::vector<std::int32_t> block_of_row;                          // where a row's K and V are written first
  std::vector<std::pair<std::int64_t, std::int32_t>> more_blocks;  // (row, block) where they are needed too
  std::map<std::int32_t, std::size_t> tree_of_block;
  std::vector<std::vector<std::int64_t>> ranges;  // of rows that see a block
  for (std::size_t s = 0; s < sequences.size(); ++s) {
    const auto first_new = static_cast<std::size_t>(tree.num_rows());
    const std::int64_t root = heads == Heads::kShared ? -1 : -1 - static_cast<std::int64_t>(s);
    sequence_rows_.push_back(tree.add(sequences[s], root));
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
      first_keys_.push_back(static_cast<std::int32_t>(begin));
      ranges.emplace_back();
    }
    const std::size_t end_row = first_new + rows.size() - shared;
    for (std::size_t b = 0; b < table.size(); ++b) {
      const std::size_t first_position = std::max(shared, b * kB);
      for (const std::size_t row : {first_new + first_position - shared, end_row})
        ranges[static_cast<std::size_t>(table[b])].push_back(static_cast<std::int64_t>(row));
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
  tree_offsets_.push_back(0);
  for (const std::vector<std::int64_t>& tree_rows : trees_) {
    tree_rows_.insert(tree_rows_.end(), tree_rows.begin(), tree_rows.end());
    tree_offsets_.push_back(static_cast<std::int64_t>(tree_rows_.size()));
  }
  use_offsets_.push_back(0);
  for (const std::vector<std::int64_t>& block : ranges) {
    use_ranges_.insert(use_ranges_.end(), block.begin(), block.end());
    use_offsets_.push_back(static_cast<std::int64_t>(use_ranges_.size() / 2));
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

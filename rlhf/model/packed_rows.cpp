#include "rlhf/model/packed_rows.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <utility>

#include "rlhf/kernels/kernel_table.h"

namespace rlhf {
namespace {

constexpr std::int64_t kB = kernels::kBlockTokens;

struct Block {
  std::int32_t id = 0;
  bool is_new = false;
  std::span<const TokenId> tokens;
};

// Gives equal ids to equal full blocks behind equal blocks.
class BlockIndex {
 public:
  std::vector<Block> add(std::span<const TokenId> sequence) {
    std::vector<Block> blocks;
    std::int32_t parent = -1;
    for (std::size_t begin = 0; begin < sequence.size(); begin += kB) {
      const auto tokens = sequence.subspan(begin, std::min<std::size_t>(kB, sequence.size() - begin));
      Block block{next_, true, tokens};
      if (tokens.size() == kB) {
        const auto [place, inserted] = full_.try_emplace({parent, {tokens.begin(), tokens.end()}}, next_);
        block = {place->second, inserted, tokens};
      }
      next_ += block.is_new;
      parent = block.id;
      blocks.push_back(block);
    }
    return blocks;
  }

 private:
  std::map<std::pair<std::int32_t, std::vector<TokenId>>, std::int32_t> full_;
  std::int32_t next_ = 0;
};

}  // namespace

PackedRows::PackedRows(const std::vector<std::span<const TokenId>>& sequences) {
  BlockIndex index;
  std::vector<std::vector<Block>> blocks;
  for (const auto& sequence : sequences) {
    blocks.push_back(index.add(sequence));
    lengths_.push_back(static_cast<std::int64_t>(sequence.size()));
    tables_.push_back(blocks_.size());
    for (const Block& block : blocks.back()) blocks_.push_back(block.id);
  }
  std::map<std::int32_t, std::size_t> tree_of_root;
  for (std::size_t s = 0; s < sequences.size(); ++s) {
    if (blocks[s].empty()) continue;
    const auto [tree, inserted] = tree_of_root.try_emplace(blocks[s].front().id, trees_.size());
    if (inserted) trees_.emplace_back();
    const std::int32_t* table = blocks_.data() + tables_[s];
    for (std::size_t b = 0; b < blocks[s].size(); ++b) {
      const Block& block = blocks[s][b];
      if (!block.is_new) continue;
      first_rows_.push_back(rows_.size());
      for (std::size_t i = 0; i < block.tokens.size(); ++i) {
        trees_[tree->second].push_back(rows_.size());
        rows_.tokens.push_back(block.tokens[i]);
        rows_.positions.push_back(static_cast<std::int32_t>(b * kB + i));
        rows_.tables.push_back(table);
      }
    }
  }
}

std::int64_t PackedRows::row(std::size_t sequence, std::int64_t position) const {
  const std::int32_t block = blocks_[tables_[sequence] + static_cast<std::size_t>(position / kB)];
  return first_rows_[static_cast<std::size_t>(block)] + position % kB;
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
  const auto add_rows = [&](BlockIndex& index, std::size_t item) {
    std::int64_t rows = 0;
    for (std::size_t s = 0; s < sequences_per_item; ++s)
      for (const Block& block : index.add(sequences[item * sequences_per_item + s]))
        if (block.is_new) rows += static_cast<std::int64_t>(block.tokens.size());
    return rows;
  };
  std::vector<std::vector<std::size_t>> passes;
  BlockIndex index;
  std::int64_t used = 0;
  for (const std::size_t item : order) {
    std::int64_t rows = add_rows(index, item);
    if (passes.empty() || used + rows > max_rows) {
      passes.emplace_back();
      index = {};
      used = 0;
      rows = add_rows(index, item);
    }
    passes.back().push_back(item);
    used += rows;
  }
  return passes;
}

}  // namespace rlhf

#include "rlhf/model/device_rows.h"

#include <algorithm>
#include <numeric>
#include <unordered_map>
#include <vector>

namespace rlhf {
namespace {

// The tables of a pass one behind the other.
struct JoinedTables {
  std::vector<std::int32_t> blocks;
  std::vector<std::size_t> offsets;  ///< of row t's table
};

JoinedTables join_tables(const Rows& rows) {
  struct Table {
    std::int64_t blocks = 0;
    std::size_t offset = 0;
  };
  std::unordered_map<const std::int32_t*, Table> tables;
  std::vector<const std::int32_t*> order;  // of first use: the layout does not depend on addresses
  for (std::size_t t = 0; t < rows.tables.size(); ++t) {
    Table& table = tables[rows.tables[t]];
    if (table.blocks == 0) order.push_back(rows.tables[t]);
    table.blocks = std::max<std::int64_t>(table.blocks, rows.positions[t] / kernels::kBlockTokens + 1);
  }
  JoinedTables joined;
  for (const std::int32_t* from : order) {
    Table& table = tables[from];
    table.offset = joined.blocks.size();
    joined.blocks.insert(joined.blocks.end(), from, from + table.blocks);
  }
  for (const std::int32_t* from : rows.tables) joined.offsets.push_back(tables[from].offset);
  return joined;
}

}  // namespace

RowTiles find_tiles(const Rows& rows) {
  RowTiles found;
  const auto count = static_cast<std::int32_t>(rows.size());
  for (std::int32_t first = 0, end = 0; first < count; first = end) {
    const auto begin = static_cast<std::size_t>(first);
    const auto goes_on = [&](std::int32_t t) {
      const auto row = static_cast<std::size_t>(t);
      return rows.tables[row] == rows.tables[begin] && rows.positions[row] == rows.positions[row - 1] + 1;
    };
    for (end = first + 1; end < count && goes_on(end);) ++end;
    if (end - first < kernels::kMinTileRows) {
      for (std::int32_t t = first; t < end; ++t) found.single_rows.push_back(t);
      continue;
    }
    for (std::int32_t t = first; t < end; t += kernels::kTileRows) {
      found.tiles.push_back(t);
      found.tiles.push_back(std::min<std::int32_t>(end - t, kernels::kTileRows));
    }
  }
  return found;
}

const kernels::PassRows& DeviceRows::place(const Rows& rows) {
  const JoinedTables joined = join_tables(rows);
  staging_.clear();
  const auto tokens = staging_.add(rows.tokens);
  const auto positions = staging_.add(rows.positions);
  const auto tables = staging_.add(rows.tables);
  const auto copy_offsets = staging_.add(rows.copy_offsets);
  const auto copies = staging_.add(rows.copies);
  const RowTiles found = find_tiles(rows);
  const auto tiles = staging_.add(found.tiles), single_rows = staging_.add(found.single_rows);
  // Last: the places of all else depend on the number of rows only.
  const auto blocks = staging_.add(joined.blocks);
  staging_.reserve();
  for (std::size_t t = 0; t < rows.tables.size(); ++t)
    staging_.host(tables)[t] = staging_.device(blocks) + joined.offsets[t];
  staging_.upload();
  view_ = rows.view();
  view_.tokens = staging_.device(tokens);
  view_.positions = staging_.device(positions);
  view_.tables = staging_.device(tables);
  view_.copy_offsets = rows.copy_offsets.empty() ? nullptr : staging_.device(copy_offsets);
  view_.copies = staging_.device(copies);
  view_.tiles = staging_.device(tiles);
  view_.num_tiles = static_cast<std::int64_t>(found.tiles.size() / 2);
  view_.single_rows = staging_.device(single_rows);
  view_.num_single_rows = static_cast<std::int64_t>(found.single_rows.size());
  return view_;
}

namespace {

// Runs of kBlocksPerGroup blocks by the rows that see the first of them, most first: what takes longest
// begins first, so that the multiprocessors end together.
std::vector<std::int32_t> groups_by_work(const kernels::BlockUses& uses) {
  const std::int64_t count = kernels::ceil_div(uses.num_blocks, kernels::kBlocksPerGroup);
  std::vector<std::int64_t> work;
  for (std::int64_t group = 0; group < count; ++group) {
    std::int64_t rows = 0;
    const std::int64_t block = group * kernels::kBlocksPerGroup;
    for (std::int64_t r = uses.offsets[block]; r < uses.offsets[block + 1]; ++r)
      rows += uses.ranges[2 * r + 1] - uses.ranges[2 * r];
    work.push_back(rows);
  }
  std::vector<std::int32_t> groups(work.size());
  std::iota(groups.begin(), groups.end(), 0);
  std::ranges::stable_sort(groups, [&](auto a, auto b) { return work[to_size(a)] > work[to_size(b)]; });
  return groups;
}

}  // namespace

const kernels::BlockUses& DeviceBlockUses::place(const PackedRows& packed) {
  view_ = packed.block_uses();
  const auto array = [](const auto* values, std::int64_t count) {
    return std::span(values, static_cast<std::size_t>(count));
  };
  staging_.clear();
  const auto offsets = staging_.add(array(view_.offsets, view_.num_blocks + 1));
  const auto ranges = staging_.add(array(view_.ranges, 2 * view_.offsets[view_.num_blocks]));
  const auto first_keys = staging_.add(array(view_.first_keys, view_.num_blocks));
  const auto groups = staging_.add(groups_by_work(view_));
  staging_.reserve();
  staging_.upload();
  view_.offsets = staging_.device(offsets);
  view_.ranges = staging_.device(ranges);
  view_.first_keys = staging_.device(first_keys);
  view_.groups = staging_.device(groups);
  return view_;
}

}  // namespace rlhf

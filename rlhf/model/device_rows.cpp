#include "rlhf/model/device_rows.h"

#include <algorithm>
#include <unordered_map>
#include <vector>

namespace rlhf {
namespace {

template <class V>
std::vector<V> copy_of(const V* values, std::int64_t count) {
  return {values, values + count};
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

DeviceRows::DeviceRows(DeviceMemory& memory, const Rows& rows)
    : tokens_(memory, rows.tokens),
      positions_(memory, rows.positions),
      copies_(memory, rows.copies),
      copy_offsets_(memory, rows.copy_offsets),
      view_(rows.view()) {
  struct Table {
    std::int64_t blocks = 0, offset = 0;
  };
  std::unordered_map<const std::int32_t*, Table> tables;
  for (std::size_t t = 0; t < rows.tables.size(); ++t) {
    Table& table = tables[rows.tables[t]];
    table.blocks = std::max<std::int64_t>(table.blocks, rows.positions[t] / kernels::kBlockTokens + 1);
  }
  std::vector<std::int32_t> blocks;
  for (auto& [from, table] : tables) {
    table.offset = static_cast<std::int64_t>(blocks.size());
    blocks.insert(blocks.end(), from, from + table.blocks);
  }
  blocks_ = DeviceBuffer<std::int32_t>(memory, blocks);
  std::vector<const std::int32_t*> pointers;
  for (const std::int32_t* from : rows.tables) pointers.push_back(blocks_.data() + tables[from].offset);
  tables_ = DeviceBuffer<const std::int32_t*>(memory, pointers);
  view_.tokens = tokens_.data();
  view_.positions = positions_.data();
  view_.tables = tables_.data();
  view_.copy_offsets = copy_offsets_.data();
  view_.copies = copies_.data();
  const RowTiles found = find_tiles(rows);
  tiles_ = DeviceBuffer<std::int32_t>(memory, found.tiles);
  single_rows_ = DeviceBuffer<std::int32_t>(memory, found.single_rows);
  view_.tiles = tiles_.data();
  view_.num_tiles = static_cast<std::int64_t>(found.tiles.size() / 2);
  view_.single_rows = single_rows_.data();
  view_.num_single_rows = static_cast<std::int64_t>(found.single_rows.size());
}

DeviceBlockUses::DeviceBlockUses(DeviceMemory& memory, const PackedRows& packed)
    : view_(packed.block_uses()) {
  offsets_ = DeviceBuffer<std::int64_t>(memory, copy_of(view_.offsets, view_.num_blocks + 1));
  ranges_ = DeviceBuffer<std::int64_t>(memory, copy_of(view_.ranges, 2 * view_.offsets[view_.num_blocks]));
  first_keys_ = DeviceBuffer<std::int32_t>(memory, copy_of(view_.first_keys, view_.num_blocks));
  view_.offsets = offsets_.data();
  view_.ranges = ranges_.data();
  view_.first_keys = first_keys_.data();
}

}  // namespace rlhf

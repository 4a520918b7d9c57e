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

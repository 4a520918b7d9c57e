#include "rlhf/model/device_rows.h"

#include <algorithm>
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

const kernels::PassRows& DeviceRows::place(const Rows& rows) {
  const JoinedTables joined = join_tables(rows);
  staging_.clear();
  const auto tokens = staging_.add(rows.tokens);
  const auto positions = staging_.add(rows.positions);
  const auto tables = staging_.add(rows.tables);
  const auto copy_offsets = staging_.add(rows.copy_offsets);
  const auto copies = staging_.add(rows.copies);
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
  return view_;
}

const kernels::BlockUses& DeviceBlockUses::place(const PackedRows& packed) {
  view_ = packed.block_uses();
  const auto array = [](const auto* values, std::int64_t count) {
    return std::span(values, static_cast<std::size_t>(count));
  };
  staging_.clear();
  const auto offsets = staging_.add(array(view_.offsets, view_.num_blocks + 1));
  const auto ranges = staging_.add(array(view_.ranges, 2 * view_.offsets[view_.num_blocks]));
  const auto first_keys = staging_.add(array(view_.first_keys, view_.num_blocks));
  staging_.reserve();
  staging_.upload();
  view_.offsets = staging_.device(offsets);
  view_.ranges = staging_.device(ranges);
  view_.first_keys = staging_.device(first_keys);
  return view_;
}

}  // namespace rlhf

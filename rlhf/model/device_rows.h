#pragma once

#include <cstdint>
#include <vector>

#include "rlhf/model/packed_rows.h"
#include "rlhf/tensor/device_memory.h"

namespace rlhf {

/// The rows of a pass in tiles of PassRows and one by one.
struct RowTiles {
  std::vector<std::int32_t> tiles;        ///< first row, number of rows
  std::vector<std::int32_t> single_rows;  ///< ascending
};
/// Cuts every run of rows of one table with ascending positions that has kMinTileRows rows or more.
RowTiles find_tiles(const Rows& rows);

/// The rows of one pass in a device's memory. Block tables are uploaded once per sequence, as far as the pass
/// reads them.
class DeviceRows {
 public:
  DeviceRows(DeviceMemory& memory, const Rows& rows);

  const kernels::PassRows& view() const { return view_; }

 private:
  DeviceBuffer<TokenId> tokens_;
  DeviceBuffer<std::int32_t> positions_, blocks_, copies_;
  DeviceBuffer<const std::int32_t*> tables_;
  DeviceBuffer<std::size_t> copy_offsets_;
  DeviceBuffer<std::int32_t> tiles_, single_rows_;
  kernels::PassRows view_;
};

/// Which rows see which block, in a device's memory.
class DeviceBlockUses {
 public:
  DeviceBlockUses(DeviceMemory& memory, const PackedRows& packed);

  const kernels::BlockUses& view() const { return view_; }

 private:
  DeviceBuffer<std::int64_t> offsets_, ranges_;
  DeviceBuffer<std::int32_t> first_keys_;
  kernels::BlockUses view_;
};

}  // namespace rlhf

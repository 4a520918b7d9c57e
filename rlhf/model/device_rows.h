#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "rlhf/model/packed_rows.h"
#include "rlhf/tensor/staging.h"

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
  explicit DeviceRows(DeviceMemory& memory) : staging_(memory) {}
  DeviceRows(DeviceMemory& memory, const Rows& rows) : DeviceRows(memory) { place(rows); }

  /// Uploads the rows; what was placed before is overwritten behind what is queued.
  const kernels::PassRows& place(const Rows& rows);
  const kernels::PassRows& view() const { return view_; }
  /// Raises the number of keys that kernels are queued for.
  void reach(std::int64_t max_keys) { view_.max_keys = std::max(view_.max_keys, max_keys); }

 private:
  Staging staging_;
  kernels::PassRows view_;
};

/// Which rows see which block, in a device's memory.
class DeviceBlockUses {
 public:
  explicit DeviceBlockUses(DeviceMemory& memory) : staging_(memory) {}
  DeviceBlockUses(DeviceMemory& memory, const PackedRows& packed) : DeviceBlockUses(memory) { place(packed); }

  const kernels::BlockUses& place(const PackedRows& packed);
  const kernels::BlockUses& view() const { return view_; }

 private:
  Staging staging_;
  kernels::BlockUses view_;
};

}  // namespace rlhf

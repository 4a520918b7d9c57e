#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "rlhf/model/packed_rows.h"
#include "rlhf/tensor/buffer.h"

namespace rlhf {

/// Hidden states behind the first layers of every token in the cache, in the blocks of its K and V: where the
/// trainer does not change those layers, it need not run them again.
class TrunkStore {
 public:
  /// @param width of a hidden state; 0 = nothing is kept
  TrunkStore(std::int64_t width, std::int64_t num_blocks);

  bool keeps() const { return width_ > 0; }
  /// Keeps the states [rows, width] of the rows of a step.
  void keep(const Rows& rows, const float* states);
  /// States of the first `length` tokens of a sequence, [length, width].
  std::vector<float> gather(std::span<const std::int32_t> table, std::int64_t length) const;
  void copy_block(std::int64_t from, std::int64_t to);
  /// As KvStore::discard_blocks.
  void discard_blocks(std::int64_t begin, std::int64_t end);
  std::size_t bytes() const { return states_.bytes(); }

 private:
  std::int64_t width_, block_stride_;
  Buffer<float> states_;  ///< [num_blocks][block][width]
};

}  // namespace rlhf

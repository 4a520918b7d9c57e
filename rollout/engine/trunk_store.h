#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "rlhf/model/packed_rows.h"

namespace rlhf {

/// Hidden states behind the first layers of every token in the cache, in the blocks of its K and V: where the
/// trainer does not change those layers, it need not run them again.
class TrunkStore {
 public:
  /// @param width of a hidden state; 0 = nothing is kept
  /// @param first place of block 0; that of block i is i * `stride` elements further
  TrunkStore(std::int64_t width, float* first, std::int64_t stride)
      : width_(width), first_(first), stride_(stride) {}

  bool keeps() const { return width_ > 0; }
  /// Keeps the states [rows, width] of the rows of a step.
  void keep(const Rows& rows, const float* states);
  /// States of the first `length` tokens of a sequence, [length, width].
  std::vector<float> gather(std::span<const std::int32_t> table, std::int64_t length) const;
  void copy_block(std::int64_t from, std::int64_t to);
  /// Bytes that one block takes.
  static std::size_t block_bytes(std::int64_t width);

 private:
  std::int64_t width_;
  float* first_;
  std::int64_t stride_;
};

}  // namespace rlhf

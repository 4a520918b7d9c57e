#include "rollout/engine/trunk_store.h"

#include <algorithm>

#include "rlhf/kernels/kernel_table.h"

namespace rlhf {
namespace {
using kernels::kBlockTokens;
}

TrunkStore::TrunkStore(std::int64_t width, std::int64_t num_blocks)
    : width_(width),
      block_stride_(kBlockTokens * width),
      states_(static_cast<std::size_t>(block_stride_ * num_blocks)) {}

void TrunkStore::keep(const Rows& rows, const float* states) {
  for (std::int64_t t = 0; t < rows.size(); ++t) {
    const auto row = static_cast<std::size_t>(t);
    const std::int64_t position = rows.positions[row], block = rows.tables[row][position / kBlockTokens];
    std::copy_n(states + t * width_, width_,
                states_.data() + block * block_stride_ + position % kBlockTokens * width_);
  }
}

std::vector<float> TrunkStore::gather(std::span<const std::int32_t> table, std::int64_t length) const {
  std::vector<float> out;
  out.reserve(static_cast<std::size_t>(length * width_));
  for (std::int64_t begin = 0; begin < length; begin += kBlockTokens) {
    const float* block =
        states_.data() + table[static_cast<std::size_t>(begin / kBlockTokens)] * block_stride_;
    out.insert(out.end(), block, block + std::min(kBlockTokens, length - begin) * width_);
  }
  return out;
}

void TrunkStore::copy_block(std::int64_t from, std::int64_t to) {
  std::copy_n(states_.data() + from * block_stride_, block_stride_, states_.data() + to * block_stride_);
}

void TrunkStore::discard_blocks(std::int64_t begin, std::int64_t end) {
  states_.discard(static_cast<std::size_t>(begin * block_stride_),
                  static_cast<std::size_t>(end * block_stride_));
}

}  // namespace rlhf

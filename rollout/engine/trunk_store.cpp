#include "rollout/engine/trunk_store.h"

#include <algorithm>

#include "rlhf/kernels/kernel_table.h"

namespace rlhf {
namespace {
using kernels::kBlockTokens;
}

std::size_t TrunkStore::block_bytes(std::int64_t width) {
  return static_cast<std::size_t>(kBlockTokens * width) * sizeof(float);
}

void TrunkStore::keep(const Rows& rows, const float* states) {
  for (std::int64_t t = 0; t < rows.size(); ++t) {
    const auto row = static_cast<std::size_t>(t);
    const std::int64_t position = rows.positions[row], block = rows.tables[row][position / kBlockTokens];
    std::copy_n(states + t * width_, width_, first_ + block * stride_ + position % kBlockTokens * width_);
  }
}

std::vector<float> TrunkStore::gather(std::span<const std::int32_t> table, std::int64_t length) const {
  std::vector<float> out;
  out.reserve(static_cast<std::size_t>(length * width_));
  for (std::int64_t begin = 0; begin < length; begin += kBlockTokens) {
    const float* block = first_ + table[static_cast<std::size_t>(begin / kBlockTokens)] * stride_;
    out.insert(out.end(), block, block + std::min(kBlockTokens, length - begin) * width_);
  }
  return out;
}

void TrunkStore::copy_block(std::int64_t from, std::int64_t to) {
  std::copy_n(first_ + from * stride_, kBlockTokens * width_, first_ + to * stride_);
}

}  // namespace rlhf
